"""How wrong propensities may be before a verdict changes (a sensitivity bound).

Every weight may be wrong by a factor of at most gamma, in either direction, and differently in each
row. The self-normalized value sum(l w r) / sum(l w) with factors l in [1 / gamma, gamma] is then
largest where l = gamma for rewards above a threshold and 1 / gamma below it, and least the other
way around. Sources: Rosenbaum (Observational Studies, 2002, chapter 4); Zhao, Small and
Bhattacharya (JRSS B, 2019), whose model bounds odds instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.evaluation.rows import EvaluationRows

BINS = 1024
"""Rewards are held by bins of their range: bounds are exact to within one bin."""
MOST = 1e3
"""Factors are not searched beyond this one."""


@dataclass(frozen=True)
class SensitivitySums:
    """Sums of weights and of weighted rewards, by bins of the reward.

    reward_range: least and largest possible reward. weight, reward: (BINS,) sums of w and w r.
    """

    reward_range: tuple[float, float]
    weight: NDArray[np.float64]
    reward: NDArray[np.float64]

    @classmethod
    def of(cls, rows: EvaluationRows, reward_range: tuple[float, float]) -> SensitivitySums:
        low, high = reward_range
        place = (rows.reward - low) / (high - low) * (BINS - 1)
        index = np.clip(np.rint(place), 0, BINS - 1).astype(np.int64)
        weight = rows.importance_weight
        if rows.row_weight is not None:
            weight = weight * rows.row_weight
        return cls(
            reward_range,
            np.bincount(index, weight, BINS).astype(np.float64),
            np.bincount(index, weight * rows.reward, BINS).astype(np.float64),
        )

    def merge(self, other: SensitivitySums) -> SensitivitySums:
        """Sums over both shards."""
        return SensitivitySums(
            self.reward_range, self.weight + other.weight, self.reward + other.reward
        )

    def bounds(self, gamma: float) -> tuple[float, float]:
        """Least and largest self-normalized value where each weight is wrong by at most gamma.

        NaN where all weights are 0.
        """
        total, weighted = self.weight.sum(), self.reward.sum()
        if not total > 0.0:
            return float("nan"), float("nan")
        below = np.concatenate([[0.0], np.cumsum(self.weight)])
        below_reward = np.concatenate([[0.0], np.cumsum(self.reward)])
        ends = []
        for down, up in ((gamma, 1.0 / gamma), (1.0 / gamma, gamma)):
            mass = down * below + up * (total - below)
            value = (down * below_reward + up * (weighted - below_reward)) / mass
            ends.append(value)
        return float(ends[0].min()), float(ends[1].max())

    def largest_factor(self, logging: float, half_width: float, margin: float) -> float | None:
        """The largest gamma for which the value stays on its side of `logging` + `margin`.

        Args:
            logging: value of the logging policy.
            half_width: of the interval of the difference, kept free on that side.

        Returns:
            At least 1, at most MOST; None where the value is on neither side for gamma 1.
        """
        value, _ = self.bounds(1.0)
        threshold = logging + margin

        def holds(gamma: float) -> bool:
            low, high = self.bounds(gamma)
            if value > threshold:
                return low - half_width > threshold
            return high + half_width < threshold

        if not holds(1.0):
            return None
        if holds(MOST):
            return MOST
        low, high = 0.0, float(np.log(MOST))
        for _ in range(50):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if holds(float(np.exp(middle))) else (low, middle)
        return float(np.exp(low))
