"""Which rows judge which member: folds that keep a user, or a repeated context, on one side."""

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
"""Held-out folds from this number on have no rows: their members learn from all."""


_COUNTED_ROWS = 100_000
"""Rows that the balance of the folds is counted on."""


@dataclass(frozen=True)
class Folds:
    """A cut of the log.

    Attributes:
        number: folds that the log is cut into.
        held_out: fold of each member: the rows that it does not learn from.
        seed: of the cut.
        by_row: cut by row, whatever its user or context.
    """

    number: int
    held_out: tuple[int, ...]
    seed: int
    by_row: bool = False

    def of(self, rows: EncodedRows) -> NDArray[np.int8]:
        """(n,) fold of each row, by its user, or by its context where the log knows no users.

        A member that met a context in training would be judged on what it remembers of it, and the
        one that remembers most would be chosen.
        """
        return fold_of(self.key(rows), self.number, derive_seed(self.seed, "auto folds"))

    def key(self, rows: EncodedRows) -> NDArray[np.uint64]:
        """(n,) what stays on one side of the cut."""
        if self.by_row:
            return rows.row.astype(np.uint64)
        return context_key(rows) if rows.user_id is None else rows.user_id

    def balanced(self, parts: Iterable[EncodedRows]) -> Folds:
        """These folds, or folds by row where a few users or contexts have most of the log: else a
        member would learn from next to nothing."""
        counts = np.zeros(self.number, dtype=np.int64)
        for rows in parts:
            counts += np.bincount(self.of(rows), minlength=self.number)
            if counts.sum() >= _COUNTED_ROWS:
                break
        share = counts / max(int(counts.sum()), 1)
        even = 1.0 / self.number
        return self if (np.abs(share - even) < 0.5 * even).all() else replace(self, by_row=True)

    def none_held_out(self) -> Folds:
        """As many members, each with a start of its own, that learn from all rows."""
        return replace(self, held_out=tuple(NOTHING + k for k in range(len(self.held_out))))

    def sampled(self, rows: EncodedRows, share: float) -> NDArray[np.bool_]:
        """(n,) whether a row is in a sample of this share; by row, always the same."""
        if share >= 1.0:
            return np.ones(len(rows), dtype=bool)
        place = keyed_hash(rows.row, derive_seed(self.seed, "judged"))
        return place < np.uint64(share * 2**64)


def context_key(rows: EncodedRows) -> NDArray[np.uint64]:
    """(n,) keys of the encoded contexts: equal contexts, equal keys, in every batch.

    Sums of integers, so that no order of summation can change them.
    """
    key = np.zeros(len(rows), dtype=np.uint64)
    for place, name in enumerate(sorted(rows.context)):
        value = rows.context[name]
        if isinstance(value, BagArray):
            part = _sums(keyed_hash(value.values, place), value.offsets)
        else:
            bits = np.ascontiguousarray(value).reshape(len(rows), -1)
            unsigned = bits.view(np.uint32 if bits.dtype.itemsize == 4 else np.uint64)
            factor = keyed_hash(np.arange(unsigned.shape[1]), place) | np.uint64(1)
            # Column by column: a product of the whole block would be its size again, twice as wide.
            part = np.zeros(len(rows), dtype=np.uint64)
            for column in range(unsigned.shape[1]):
                part += unsigned[:, column].astype(np.uint64) * factor[column]
        key = keyed_hash(key ^ part, place + 1)
    return key


def _sums(values: NDArray[np.uint64], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Sum of each segment, in arithmetic modulo 2^64."""
    running = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(values, dtype=np.uint64)])
    result: NDArray[np.uint64] = running[offsets[1:]] - running[offsets[:-1]]
    return result
