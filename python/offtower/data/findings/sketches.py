"""Mergeable counts in bounded memory: repeated keys, sets of items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.data.columns import splitmix64

DUPLICATE_KEYS = 8_000_000
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
"""Bits set in each byte."""


@dataclass(frozen=True, eq=False)
class DuplicateCount:
    """Counts repeated keys in bounded memory, by a hash sample of the keys beyond a limit.

    The sample depends on the set of keys alone, so that parts merge in any order.

    Attributes:
        key: (g,) hashed keys, sorted and distinct.
        times: (g,) occurrences of each.
        shift: keys whose first `shift` bits are 0 are kept, and the count is scaled by 2**shift.
        row: (g,) number of the last row with each key; 0 where it is not asked for.
    """

    key: NDArray[np.uint64]
    times: NDArray[np.int64]
    row: NDArray[np.int64]
    shift: int = 0
    limit: int = DUPLICATE_KEYS

    @classmethod
    def of(
        cls,
        keys: NDArray[np.uint64],
        limit: int = DUPLICATE_KEYS,
        row: NDArray[np.int64] | None = None,
    ) -> DuplicateCount:
        """Count keys; row: (n,) the numbers of their rows, for examples."""
        # The last of equal keys is the first of them from behind.
        key, place, times = np.unique(splitmix64(keys[::-1]), return_index=True, return_counts=True)
        last = np.zeros(key.size, dtype=np.int64) if row is None else row[::-1][place]
        return cls(key, times, last, 0, limit)._bounded()

    def merge(self, other: DuplicateCount) -> DuplicateCount:
        """Merge."""
        shift = max(self.shift, other.shift)
        one, two = self._above(shift), other._above(shift)
        key = np.concatenate([one.key, two.key])
        order = np.argsort(key, kind="stable")
        key, times = key[order], np.concatenate([one.times, two.times])[order]
        row = np.concatenate([one.row, two.row])[order]
        first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if key.size else order
        if key.size:
            times, row = np.add.reduceat(times, first), np.maximum.reduceat(row, first)
        return DuplicateCount(key[first], times, row, shift, self.limit)._bounded()

    def examples(self) -> NDArray[np.int64]:
        """Numbers of rows that repeat an earlier one, in order."""
        return np.sort(self.row[self.times > 1])

    def count(self) -> int:
        """Count rows that repeat an earlier key; an estimate if `shift` is above 0."""
        return int(self.times.sum() - self.key.size) << self.shift

    def _above(self, shift: int) -> DuplicateCount:
        if shift == self.shift:
            return self
        kept = self.key >> np.uint64(64 - shift) == 0
        return DuplicateCount(self.key[kept], self.times[kept], self.row[kept], shift, self.limit)

    def _bounded(self) -> DuplicateCount:
        found = self
        while found.key.size > found.limit:
            found = found._above(found.shift + 1)
        return found


@dataclass(frozen=True, eq=False)
class ItemSet:
    """A set of item numbers: sorted, or as a bitmap if there are many."""

    num_items: int
    numbers: NDArray[np.int64] | None
    bits: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, numbers: NDArray[np.int64], num_items: int) -> ItemSet:
        return cls(num_items, np.unique(numbers))._small()

    def merge(self, other: ItemSet) -> ItemSet:
        """Return the union."""
        if self.numbers is not None and other.numbers is not None:
            return ItemSet(self.num_items, np.union1d(self.numbers, other.numbers))._small()
        return ItemSet(self.num_items, None, self._packed() | other._packed())

    def __len__(self) -> int:
        if self.numbers is not None:
            return int(self.numbers.size)
        return int(_BITS[self._packed()].sum(dtype=np.int64))

    def _packed(self) -> NDArray[np.uint8]:
        if self.bits is not None:
            return self.bits
        mask = np.zeros(self.num_items, dtype=bool)
        mask[self.numbers] = True
        return np.packbits(mask)

    def _small(self) -> ItemSet:
        assert self.numbers is not None
        if self.numbers.size * 64 <= self.num_items:
            return self
        return ItemSet(self.num_items, None, self._packed())
