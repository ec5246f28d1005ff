"""The rewarded rows of a log in memory, for objectives that read no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from offtower.data.order import Cursor, EpochOrder, keyed_hash
from offtower.data.reader import FoldOf, Step
from offtower.data.rows import EncodedRows
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.sampling import ItemCounts
from offtower.seeds import derive_seed

SCAN_ROWS = 8192
_RARE = 0.2
"""Share of rewarded rows from which these are thinned like the others."""


@dataclass(frozen=True)
class KeptRows:
    """Encoded rows, given out in batches like those of `PreparedData`."""

    rows: EncodedRows

    @property
    def row_group_sizes(self) -> NDArray[np.int64]:
        return np.array([len(self.rows)], dtype=np.int64)

    @cached_property
    def counts(self) -> ItemCounts:
        """Rows of each item."""
        return ItemCounts.of(self.rows.action)

    def batches(self, order: EpochOrder, fold: FoldOf | None = None) -> KeptBatches:
        return KeptBatches(self.rows, order, fold)


class KeptBatches:
    """Batches of rows in memory, in the order of an `EpochOrder` of one window."""

    def __init__(self, rows: EncodedRows, order: EpochOrder, fold: FoldOf | None) -> None:
        self._rows, self._order = rows, order
        self._folds = None if fold is None else fold(rows)

    def epoch(self, epoch: int) -> Iterator[Step]:
        batches = self._order.batches(epoch, 0, len(self._rows), self._folds)
        for turn, batch in enumerate(batches, 1):
            yield Step(Cursor(epoch, 0, turn), self._rows.take(batch.index), batch.fold)

    def __enter__(self) -> KeptBatches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """There is nothing to close."""


def keep_rewarded(data: PreparedData, max_rows: int, progress: Progress) -> KeptRows:
    """Read the log once and keep its first rows with a reward other than 0.

    Args:
        max_rows: number of rows that are kept, at least 1.
    """
    parts: list[EncodedRows] = []
    kept = 0
    progress.start("reading rewarded rows", data.train.num_rows)
    for rows in data.scan(SCAN_ROWS):
        index = np.flatnonzero(rows.reward)[: max_rows - kept]
        if len(index) or not parts:
            parts.append(rows.take(index))
            kept += len(index)
        progress.advance(len(rows))
        if kept == max_rows:
            break
    progress.finish()
    return KeptRows(EncodedRows.concat(parts))


def keep_thinned(data: PreparedData, thinning: int, seed: int, progress: Progress) -> KeptRows:
    """Read the log once and keep a sample of its rows by a keyed hash.

    Where rewards are rare, all rewarded rows are kept, and each other one has a `row_weight` of
    `thinning`.

    Args:
        thinning: one in so many rows is kept.
    """
    rare = rare_rewards(data)
    seed = derive_seed(seed, "auto solved rows")
    parts: list[EncodedRows] = []
    progress.start("reading rows into memory", data.train.num_rows)
    for rows in data.scan(SCAN_ROWS):
        kept = keyed_hash(rows.row, seed) <= np.uint64((2**64 - 1) // thinning)
        weight = np.ones(len(rows)) if rows.row_weight is None else rows.row_weight
        if rare:
            kept |= rows.reward != 0.0
            weight = np.where(rows.reward == 0.0, thinning * weight, weight)
        index = np.flatnonzero(kept)
        parts.append(replace(rows.take(index), row_weight=weight[index]))
        progress.advance(len(rows))
    progress.finish()
    return KeptRows(EncodedRows.concat(parts))


def thinning_for(data: PreparedData, rows: int, wanted: int) -> int:
    """The thinning with which `keep_thinned` keeps about `wanted` of `rows` rows. Where rewards are
    rare, a row without reward is kept for each rewarded one, at least."""
    if rows <= wanted:
        return 1
    rewarded = data.facts.mean_reward * rows if rare_rewards(data) else 0.0
    return round((rows - rewarded) / max(wanted - rewarded, rewarded, 1.0)) or 1


def rare_rewards(data: PreparedData) -> bool:
    """Whether rewards are 0 or 1, and few are 1."""
    return data.facts.binary_reward and data.facts.mean_reward < _RARE
