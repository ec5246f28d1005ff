"""Folds of the log that keep a user, or a repeated context, on one side of the split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offtower.data.encoding import BagArray
from offtower.data.order import MAX_FOLDS, fold_of, keyed_hash
from offtower.data.rows import EncodedRows
from offtower.seeds import derive_seed

NOTHING = MAX_FOLDS
"""Held-out folds from this number on have no rows: their members see all rows."""

_COUNTED_ROWS = 100_000
"""Rows on which the balance of the folds is checked."""


@dataclass(frozen=True)
class Folds:
    """A split of the log.

    Attributes:
        number: of folds.
        held_out: fold that each member does not see.
        seed: of the split.
        by_row: split by row, or round, instead of by user or context.
    """

    number: int
    held_out: tuple[int, ...]
    seed: int
    by_row: bool = False

    def of(self, rows: EncodedRows) -> NDArray[np.int8]:
        """(n,) fold of each row, by its user, or by its context where the log has no users.

        If a context were on both sides, the choice would favor members that memorize contexts.
        """
        return fold_of(self.key(rows), self.number, derive_seed(self.seed, "auto folds"))

    def key(self, rows: EncodedRows) -> NDArray[np.uint64]:
        """(n,) key of the user or context; rows with equal keys share a fold."""
        if self.by_row:
            return (rows.row if rows.round_id is None else rows.round_id).astype(np.uint64)
        return context_key(rows) if rows.user_id is None else rows.user_id

    def balanced(self, parts: Iterable[EncodedRows]) -> Folds:
        """Return these folds, or folds by row if few users or contexts have most of the log, which
        would leave some members almost no rows."""
        counts = np.zeros(self.number, dtype=np.int64)
        for rows in parts:
            counts += np.bincount(self.of(rows), minlength=self.number)
            if counts.sum() >= _COUNTED_ROWS:
                break
        share = counts / max(int(counts.sum()), 1)
        even = 1.0 / self.number
        return self if (np.abs(share - even) < 0.5 * even).all() else replace(self, by_row=True)

    def none_held_out(self) -> Folds:
        """Return folds with as many members, each of which sees all rows."""
        return replace(self, held_out=tuple(NOTHING + k for k in range(len(self.held_out))))

    def sampled(self, rows: EncodedRows, start: float, stop: float) -> NDArray[np.bool_]:
        """(n,) whether a row is between two shares of the log in a seeded order of its numbers, or
        rounds."""
        if (start, stop) == (0.0, 1.0):
            return np.ones(len(rows), dtype=bool)
        seed = derive_seed(self.seed, "judged")  # wording: keep; it names a random stream
        key = rows.row if rows.round_id is None else rows.round_id
        place = keyed_hash(key, seed)
        found = place >= np.uint64(start * 2**64)
        return found if stop >= 1.0 else found & (place < np.uint64(stop * 2**64))


def context_key(rows: EncodedRows) -> NDArray[np.uint64]:
    """(n,) keys of the encoded contexts; equal contexts have equal keys in every batch.

    Keys are sums of integers, which do not depend on the order of summation.
    """
    key = np.zeros(len(rows), dtype=np.uint64)
    for index, name in enumerate(sorted(rows.context)):
        value = rows.context[name]
        if isinstance(value, BagArray):
            part = _sums(keyed_hash(value.values, index), value.offsets)
        else:
            bits = np.ascontiguousarray(value).reshape(len(rows), -1)
            unsigned = bits.view(np.uint32 if bits.dtype.itemsize == 4 else np.uint64)
            factor = keyed_hash(np.arange(unsigned.shape[1]), index) | np.uint64(1)
            # By column: a product of the whole block would take twice its memory.
            part = np.zeros(len(rows), dtype=np.uint64)
            for column in range(unsigned.shape[1]):
                part += unsigned[:, column].astype(np.uint64) * factor[column]
        key = keyed_hash(key ^ part, index + 1)
    return key


def _sums(values: NDArray[np.uint64], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Sum of each segment modulo 2^64."""
    running = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(values, dtype=np.uint64)])
    result: NDArray[np.uint64] = running[offsets[1:]] - running[offsets[:-1]]
    return result
