"""Rewarded rows of the training log: their number per item, and their weights 1 / pscore."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.prepare import PreparedData

Array = NDArray[np.float64]

_SCAN_ROWS = 65_536
_READ_ROWS = 1 << 20
"""Counts are extrapolated from at most this many rows."""
_LARGEST = 1e12
_HALVINGS = 40


@dataclass(frozen=True)
class RewardedRows:
    """Rows with more than the minimal reward, among the first million rows of a log."""

    action: NDArray[np.int64]
    """(n,) index of the item."""
    inverse_pscore: Array
    """(n,)."""
    counts: Array
    """(N,) estimated number of rewarded rows of each item in the whole log."""

    @classmethod
    def of(cls, data: PreparedData) -> RewardedRows:
        """Read the training log; without propensities 1 / pscore is 1."""
        least = data.train.schema.reward_range[0]
        action, inverse, seen = [np.zeros(0, np.int64)], [np.zeros(0)], 0
        for rows in data.scan(_SCAN_ROWS):
            rewarded = np.flatnonzero(rows.reward > least)
            action.append(rows.action[rewarded])
            inverse.append(
                np.ones(len(rewarded))
                if rows.pscore is None
                else 1.0 / rows.pscore[rewarded].astype(np.float64)
            )
            seen += len(rows)
            if seen >= _READ_ROWS:
                break
        actions = np.concatenate(action)
        counts = np.bincount(actions, minlength=data.items.num_items).astype(np.float64)
        counts *= data.train.num_rows / max(seen, 1)
        return cls(actions, np.concatenate(inverse), counts)

    def max_weight(self, share: float, *, per_item: bool) -> float:
        """Return the largest c at which min(1 / pscore, c) keeps this share of effective rows.

        Of n weights, (sum w)^2 / sum w^2 rows are effective (Kish 1965). With `per_item` they are
        counted for each item and summed: weights that differ between items only, as in a log that
        shows items by their popularity, then cost nothing and are never clipped.
        """
        if len(self.action) == 0:
            return 1.0
        groups = np.unique(self.action, return_inverse=True)[1] if per_item else None
        low, high = float(self.inverse_pscore.min()), float(self.inverse_pscore.max())
        if self._effective(high, groups) >= share:
            return min(high, _LARGEST)
        for _ in range(_HALVINGS):
            middle = float(np.sqrt(low * high))
            if self._effective(middle, groups) >= share:
                low = middle
            else:
                high = middle
        return low

    def mean_weight(self, max_weight: float) -> float:
        """Return the mean of min(1 / pscore, max_weight); 1 without rewarded rows."""
        if len(self.action) == 0:
            return 1.0
        return float(np.minimum(self.inverse_pscore, max_weight).mean())

    def _effective(self, max_weight: float, groups: NDArray[np.int64] | None) -> float:
        weight = np.minimum(self.inverse_pscore, max_weight) / max_weight
        if groups is None:
            effective = weight.sum() ** 2 / np.square(weight).sum()
        else:
            sums = np.bincount(groups, weights=weight)
            effective = (sums**2 / np.bincount(groups, weights=np.square(weight))).sum()
        return float(effective) / len(weight)
