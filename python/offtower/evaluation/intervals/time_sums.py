"""Sums of terms by bin of time: values by period, drift and serial correlation in bounded memory.

A bin's width is the least of WIDTHS at which the log has at most MAX_BINS of them. Each width
divides the next, so that the sums of shards merge in any order into the same bins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from offtower.evaluation.intervals.user_sums import KeyedSums
from offtower.evaluation.rows import Array, IntArray

_SECOND = 1_000_000
DAY = 86_400 * _SECOND
WEEK = 7 * DAY
WIDTHS = (
    *(10**power for power in range(6)),
    *(_SECOND * s for s in (1, 5, 10, 30, 60, 300, 900, 3600, 10_800, 21_600, 43_200)),
    *(DAY * days for days in (1, 7, 28, 364, 3640, 36_400, 364_000)),
    *(DAY * 364_000 * 10**power for power in range(1, 3)),
)
"""Widths of bins in microseconds, or in the unit of times that are no dates."""
MAX_BINS = 512
SUBGROUPS = 8
"""Groups into which the rows of a bin fall, whose spread gives the noise of rows."""
_ORIGIN = -3 * DAY
"""Monday, 1969-12-29."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio (Knuth's multiplicative hash)."""


@dataclass(frozen=True, eq=False)
class TimeSums:
    """Rows (g,) and sums of terms (g, k) by bin of time and subgroup.

    Attributes:
        level: index of the bins' width in WIDTHS.
        key: (g,) bin times SUBGROUPS plus subgroup, increasing.
        first, last: earliest and latest time.
    """

    level: int
    key: IntArray
    count: Array
    total: Array
    first: int
    last: int

    @classmethod
    def of(
        cls, time: IntArray, unit: IntArray, terms: Array, row_weight: Array | None = None
    ) -> TimeSums:
        """Sum the rows of each bin, by their weights where they have any.

        Args:
            time: (n,) microseconds since 1970, or other whole numbers.
            unit: (n,) key of the row, or of its user; chooses the subgroup.
        """
        k = terms.shape[1]
        if not time.size:
            empty = np.zeros(0, dtype=np.int64)
            return cls(0, empty, np.zeros(0), np.zeros((0, k)), 2**62, -(2**62))
        first, last = int(time.min()), int(time.max())
        level = next(
            i for i, width in enumerate(WIDTHS) if max(abs(first), abs(last)) // width < 2**58
        )
        hashed = (unit.view(np.uint64) * _MULTIPLIER) >> np.uint64(61)
        bins = (time - _ORIGIN) // WIDTHS[level]
        count = np.ones(time.size) if row_weight is None else row_weight
        if row_weight is not None:
            terms = row_weight[:, None] * terms
        key = bins * SUBGROUPS + hashed.astype(np.int64)
        return cls(level, key, count, terms, first, last)._joined()._bounded()

    @property
    def width(self) -> int:
        """Width of the bins."""
        return int(WIDTHS[self.level])

    @property
    def bins(self) -> IntArray:
        """(g,) number of the bin of each sum; bin b begins at `start(b)`."""
        return self.key // SUBGROUPS

    def start(self, number: int) -> int:
        """Time at which a bin begins."""
        return int(number * self.width + _ORIGIN)

    def merge(self, other: TimeSums) -> TimeSums:
        """Sums over both shards."""
        if not self.key.size or not other.key.size:
            return self if self.key.size else other
        level = max(self.level, other.level)
        parts = [one._at(level) for one in (self, other)]
        joined = TimeSums(
            level,
            np.concatenate([one.key for one in parts]),
            np.concatenate([one.count for one in parts]),
            np.concatenate([one.total for one in parts]),
            min(self.first, other.first),
            max(self.last, other.last),
        )
        return joined._joined()._bounded()

    def select(self, columns: list[int]) -> TimeSums:
        """Sums of some of the terms."""
        return replace(self, total=self.total[:, columns])

    def _bounded(self) -> TimeSums:
        """The sums at the least width with at most MAX_BINS bins."""
        number, level = np.unique(self.bins), self.level
        while number.size > MAX_BINS:
            number = np.unique(number // (WIDTHS[level + 1] // WIDTHS[level]))
            level += 1
        return self if level == self.level else self._at(level)._joined()

    def _at(self, level: int) -> TimeSums:
        """The same with the keys of wider bins, which may repeat."""
        if level == self.level:
            return self
        bins = self.bins // (WIDTHS[level] // self.width)
        return replace(self, level=level, key=bins * SUBGROUPS + self.key % SUBGROUPS)

    def _joined(self) -> TimeSums:
        """With each key once, in order."""
        sums = KeyedSums.of(self.key, self.count, self.total)
        return replace(self, key=sums.key, count=sums.count, total=sums.total)
