"""Sums of terms by an integer key, such as a user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from offtower.evaluation.rows import Array, IntArray


@dataclass(frozen=True, eq=False)
class KeyedSums:
    """Distinct keys in order (g,), number of rows (g,) and sums of terms (g, k) of each."""

    key: IntArray
    count: Array
    total: Array

    @classmethod
    def of(cls, key: IntArray, count: Array, total: Array) -> KeyedSums:
        """Join what has equal keys: (n,), (n,) and (n, k)."""
        unique, where = np.unique(key, return_inverse=True)
        sums = [np.bincount(where, column, minlength=unique.size) for column in total.T]
        rows = np.bincount(where, count, minlength=unique.size).astype(np.float64)
        return cls(unique, rows, np.stack(sums, axis=1))

    @classmethod
    def joined(cls, runs: Sequence[KeyedSums]) -> KeyedSums:
        """The sums of several together."""
        if len(runs) == 1:
            return runs[0]
        return cls.of(
            np.concatenate([run.key for run in runs]),
            np.concatenate([run.count for run in runs]),
            np.concatenate([run.total for run in runs]),
        )


@dataclass(frozen=True, eq=False)
class UserSums:
    """Sums by user, in runs of falling size, so that adding many small shards stays cheap."""

    runs: tuple[KeyedSums, ...]

    @classmethod
    def of(cls, user: IntArray, terms: Array, row_weight: Array | None = None) -> UserSums:
        """Sum the rows of each user; with row weights, their weighted terms and their weights."""
        if row_weight is None:
            return cls((KeyedSums.of(user, np.ones(user.size), terms),))
        return cls((KeyedSums.of(user, row_weight, row_weight[:, None] * terms),))

    def merge(self, other: UserSums) -> UserSums:
        """Sums over both shards."""
        runs = sorted(self.runs + other.runs, key=lambda run: -run.key.size)
        while len(runs) > 1 and runs[-2].key.size < 2 * runs[-1].key.size:
            runs[-2:] = [KeyedSums.joined(runs[-2:])]
            runs.sort(key=lambda run: -run.key.size)
        return UserSums(tuple(runs))

    def select(self, columns: list[int]) -> UserSums:
        """Sums of some of the terms."""
        return UserSums(tuple(replace(run, total=run.total[:, columns]) for run in self.runs))

    def compact(self) -> UserSums:
        """The same in one run."""
        return self if len(self.runs) == 1 else UserSums((KeyedSums.joined(self.runs),))

    @property
    def count(self) -> int:
        """Number of users."""
        return int(self.compact().runs[0].key.size)
