"""Sources of draws, each with the expected count of every item."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from offtower.sampling.alias import AliasTable
from offtower.sampling.item_counts import ItemCounts


class Source(ABC):
    """A source of draws."""

    @abstractmethod
    def size(self, batch_rows: int) -> int:
        """Draws in a step of `batch_rows` rows."""

    @abstractmethod
    def draw(self, bits: np.random.Philox, batch_action: NDArray[np.int64]) -> NDArray[np.int64]:
        """(size,) item numbers."""

    @abstractmethod
    def expected_count(self, item: NDArray[np.int64], batch_rows: int) -> NDArray[np.float64]:
        """Expected number of draws of each item, among the draws that can hit it. Where rows of the
        batch are draws, those are the other rows."""


class UniformSource(Source):
    """m stratified uniform draws, one from each m-th of the catalogue.

    Expected counts are m / N, as for independent draws, and the variance of sums over the draws is
    never larger.
    """

    def __init__(self, num_items: int, num_samples: int) -> None:
        self.num_items, self.num_samples = num_items, num_samples

    def size(self, batch_rows: int) -> int:
        return self.num_samples

    def draw(self, bits: np.random.Philox, batch_action: NDArray[np.int64]) -> NDArray[np.int64]:
        m = self.num_samples
        item = (np.arange(m) + uniforms(bits, m)) * (self.num_items / max(m, 1))
        return np.minimum(item.astype(np.int64), self.num_items - 1)

    def expected_count(self, item: NDArray[np.int64], batch_rows: int) -> NDArray[np.float64]:
        return np.full(item.shape, self.num_samples / self.num_items)


class FrequencySource(Source):
    """m independent draws of logged items, proportional to count^power, by alias table."""

    def __init__(self, counts: ItemCounts, num_samples: int, power: float) -> None:
        self.num_samples = num_samples
        self._counts = counts
        # Relative to the largest: no power overflows.
        weight: NDArray[np.float64] = (counts.count / counts.count.max()) ** power
        self._probability = weight / weight.sum()
        self._table = AliasTable(weight)

    def size(self, batch_rows: int) -> int:
        return self.num_samples

    def draw(self, bits: np.random.Philox, batch_action: NDArray[np.int64]) -> NDArray[np.int64]:
        uniform = uniforms(bits, 2 * self.num_samples).reshape(-1, 2)
        return self._counts.item[self._table.draw(uniform)]

    def expected_count(self, item: NDArray[np.int64], batch_rows: int) -> NDArray[np.float64]:
        return self.num_samples * self._counts.lookup(item, self._probability)


class BatchSource(Source):
    """The logged items of the batch's other rows.

    A row's own item is counted exactly and its hits are masked. Another item a is hit by the B - 1
    other rows, (B - 1) f(a) times in expectation, where f(a) is its share of the log and rows are
    drawn independently. Batches of a shuffled epoch are drawn without replacement, which multiplies
    this by n / (n - 1). If row groups are shuffled in windows, or batches come from one fold, the
    expectation is over those too.
    """

    def __init__(self, counts: ItemCounts) -> None:
        self._counts = counts

    def size(self, batch_rows: int) -> int:
        return batch_rows

    def draw(self, bits: np.random.Philox, batch_action: NDArray[np.int64]) -> NDArray[np.int64]:
        return batch_action

    def expected_count(self, item: NDArray[np.int64], batch_rows: int) -> NDArray[np.float64]:
        return float(batch_rows - 1) * self._counts.share(item)


def uniforms(bits: np.random.Philox, n: int) -> NDArray[np.float64]:
    """(n,) in [0, 1) from raw bits, whose stream numpy guarantees to be stable."""
    return (bits.random_raw(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53
