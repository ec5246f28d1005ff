"""Which rows of the cells may be drawn for one context."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offtower.retrieval.cells import Cells
from offtower.retrieval.scoring import contains

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowBits:
    """The eligible rows of all contexts of a group."""

    bits: NDArray[np.uint8]
    """(ceil(N / 8),); bit r % 8 of byte r // 8 is row r."""
    count: IntArray
    """(C,) eligible rows of each cell."""

    @classmethod
    def of(cls, cells: Cells, words: NDArray[np.int64]) -> RowBits:
        """From a row of `Eligibility.bitmap`, (ceil(N / 64),) in the order of the items; O(N)."""
        n = len(cells.item_of_row)
        by_item = np.unpackbits(words.view(np.uint8), bitorder="little", count=n)
        by_row = by_item[cells.item_of_row]
        count = np.add.reduceat(by_row, cells.start[:-1], dtype=np.int64)
        return cls(np.packbits(by_row, bitorder="little"), count)

    def has(self, rows: IntArray) -> NDArray[np.bool_]:
        """(n,) whether each row is eligible."""
        return np.asarray((self.bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1, dtype=bool)


class RowFilter:
    """The rows that are in the bits, if there are any, and not excluded.

    Args:
        excluded: sorted, distinct rows.
    """

    def __init__(self, cells: Cells, excluded: IntArray, bits: RowBits | None = None) -> None:
        self.bits = bits
        self.excluded = excluded if bits is None else excluded[bits.has(excluded)]
        self.rows = len(cells.item_of_row)
        self.gone = np.bincount(cells.cell_of(self.excluded), minlength=cells.num_cells)
        """(C,) rows of each cell that must not be drawn."""
        if bits is not None:
            self.gone = self.gone + (cells.size - bits.count)
        self.left = self.rows - int(self.gone.sum())
        """Rows that may be drawn."""

    def refuses(self, rows: IntArray) -> NDArray[np.bool_]:
        """(n,) whether each row must not be drawn."""
        refused = contains(self.excluded, rows)
        if self.bits is not None:
            refused |= ~self.bits.has(rows)
        return refused

    def mask(self, logit: NDArray[np.float64]) -> None:
        """Set those of all N logits, by row, to -inf that must not be drawn."""
        logit[self.excluded] = -np.inf
        if self.bits is not None:
            there = np.unpackbits(self.bits.bits, bitorder="little", count=self.rows)
            logit[there == 0] = -np.inf

    def uniform(self, rng: np.random.Generator, size: int) -> IntArray:
        """(n,) uniform draws of the rows that may be drawn."""
        if self.bits is None:
            other = rng.integers(self.left, size=size)
            # The i-th row that is not excluded is i plus the number of excluded rows before it.
            skipped = self.excluded - np.arange(len(self.excluded))
            return np.asarray(other + np.searchsorted(skipped, other, side="right"))
        found = np.zeros(0, dtype=np.int64)
        while len(found) < size:
            tries = int(1.1 * (size - len(found)) * self.rows / self.left) + 16
            row = rng.integers(self.rows, size=tries)
            found = np.concatenate([found, row[~self.refuses(row)]])
        return found[:size]


def listed_cells(cells: Cells, rows: IntArray) -> Cells:
    """One cell of some rows alone, for exact weights of a short list."""
    return replace(
        cells,
        vectors=cells.vectors[rows],
        item_of_row=cells.item_of_row[rows],
        row_of_item=cells.row_of_item[:0],
        start=np.array([0, len(rows)]),
        mean=cells.mean[:1],
        logit_variance=cells.logit_variance[:1],
        outlier_cells=0,
    )
