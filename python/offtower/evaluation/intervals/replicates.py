"""Sums of the Poisson bootstrap over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.intervals.poisson import poisson_weights
from offtower.evaluation.rows import Array, EvaluationRows

_BLOCK_CELLS = 1 << 20
"""Bootstrap weights drawn at a time."""


@dataclass(frozen=True, eq=False)
class Replicates:
    """Bootstrap sums: per replicate the sum of weights (R,) and of weighted terms (R, k)."""

    weight: Array
    total: Array
    seed: int
    by_user: bool
    keyed: bool

    @classmethod
    def of(
        cls, terms: Array, rows: EvaluationRows, count: int, seed: int, by_user: bool
    ) -> Replicates:
        """Draw the weights of rows, or of users, and sum."""
        key = rows.user if by_user else rows.row
        keyed = key is not None
        key = np.arange(terms.shape[0], dtype=np.int64) if key is None else rows.of_unit(key)
        weight, total = np.zeros(count), np.zeros((count, terms.shape[1]))
        step = max(1, _BLOCK_CELLS // count)
        for start in range(0, terms.shape[0], step):
            drawn = poisson_weights(key[start : start + step], count, seed).astype(np.float64)
            if rows.row_weight is not None:
                drawn *= rows.row_weight[start : start + step, None]
            weight += drawn.sum(axis=0)
            total += drawn.T @ terms[start : start + step]
        return cls(weight, total, seed, by_user, keyed)

    def merge(self, other: Replicates) -> Replicates:
        if (self.seed, self.by_user, self.total.shape) != (
            other.seed,
            other.by_user,
            other.total.shape,
        ):
            raise OfftowerError(
                "bootstrap sums of two shards can be merged only if both were made with the same "
                "seed, number of replicates and unit (rows or users)"
            )
        if not (self.keyed and other.keyed):
            raise OfftowerError(
                "bootstrap sums of shards need global row numbers: give EvaluationRows its 'row' "
                "column (or 'user', for a bootstrap by user), or evaluate the log in one piece"
            )
        return Replicates(
            self.weight + other.weight,
            self.total + other.total,
            self.seed,
            self.by_user,
            keyed=True,
        )
