"""Sums of terms by group of rows: third and fourth moments of any functional in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from offtower.evaluation.rows import Array, IntArray

ROW_GROUPS = 4093
"""A prime, so that row numbers in any constant step fall into different groups."""


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Rows (G,) and sums of terms (G, k) by group, a row's group being its key modulo G.

    Up to G rows are kept one by one. Of more, the sums of independent rows have the same second and
    third cumulants in total as the rows themselves, for every linear combination of the terms.
    """

    count: Array
    total: Array

    @classmethod
    def of(cls, key: IntArray, terms: Array, row_weight: Array | None = None) -> RowGroups:
        """Sum the rows of each group, by their weights where they have any."""
        group = key % ROW_GROUPS
        if row_weight is not None:
            terms = row_weight[:, None] * terms
        sums = [np.bincount(group, column, minlength=ROW_GROUPS) for column in terms.T]
        count = np.bincount(group, row_weight, minlength=ROW_GROUPS).astype(np.float64)
        return cls(count, np.stack(sums, axis=1))

    def merge(self, other: RowGroups) -> RowGroups:
        """Sums over both shards."""
        return RowGroups(self.count + other.count, self.total + other.total)

    def select(self, columns: list[int]) -> RowGroups:
        """Sums of some of the terms."""
        return replace(self, total=self.total[:, columns])
