"""Rewards and weights of a log by day, as sums whose bounds hold at all readings.

The bounds are those of `intervals.smoothing_bound`: products of 1 + lambda Z over independent terms
with lambda fixed in advance, divided by their largest expectation, are nonnegative
supermartingales. By Ville's inequality they ever exceed 1 / delta with probability at most delta,
so that the bounds of a growing log are right at all readings at once (Howard et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offtower.evaluation.intervals.smoothing_bound import SmoothingSums, within
from offtower.evaluation.rows import Array, EvaluationRows

_UNIT = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class WeightSums:
    """Mergeable sums of weights of mean 1.

    Attributes:
        over: of the weights. under: of 1 - w / `largest`, for the upper bound.
        total, highest: sum of the weights, and the largest of them.
    """

    largest: float
    over: SmoothingSums
    under: SmoothingSums
    total: float
    highest: float

    @classmethod
    def of(cls, weight: Array, largest: float) -> WeightSums:
        """Sums of independent weights (n,).

        Args:
            largest: weight that right propensities can give.
        """
        zero = np.zeros_like(weight)
        rest = np.maximum(0.0, 1.0 - weight / largest)
        return cls(
            largest,
            SmoothingSums.of(EvaluationRows(weight, zero), _UNIT),
            SmoothingSums.of(EvaluationRows(rest, zero), _UNIT),
            float(weight.sum()),
            float(weight.max(initial=0.0)),
        )

    def merge(self, other: WeightSums) -> WeightSums:
        """Sums over both."""
        return WeightSums(
            self.largest,
            self.over.merge(other.over),
            self.under.merge(other.under),
            self.total + other.total,
            max(self.highest, other.highest),
        )

    @property
    def n(self) -> int:
        return self.over.n

    @property
    def mean(self) -> float:
        return self.total / self.n

    def bounds(self, delta: float) -> tuple[float, float | None]:
        """Bounds on the mean, each wrong with probability at most delta / 2 over all readings.

        The upper one is None where a weight exceeds the largest possible one, and then nothing
        bounds the mass of weights that were not seen.
        """
        low = self.over.mean_weight(0.5 * delta)
        if self.highest > self.largest:
            return low, None
        return low, self.largest * (1.0 - self.under.mean_weight(0.5 * delta))


@dataclass(frozen=True, eq=False)
class DaySums:
    """Mergeable sums of the independent units of a day, each the mean over the rows of a round.

    Attributes:
        rows: of the units. reward: sum of the units' rewards.
        value: for the bounds. weights: of a sample of the units; None where there is none yet.
    """

    rows: int
    reward: float
    value: SmoothingSums
    weights: WeightSums | None = None

    @classmethod
    def of(cls, rows: int, reward: Array, reward_range: tuple[float, float]) -> DaySums:
        """Sums of units with rewards (n,)."""
        units = EvaluationRows(np.ones_like(reward), reward)
        return cls(rows, float(reward.sum()), SmoothingSums.of(units, reward_range))

    @property
    def units(self) -> int:
        return self.value.n

    @property
    def mean(self) -> float:
        """Mean reward of a unit."""
        return self.reward / self.units

    def merge(self, other: DaySums) -> DaySums:
        """Sums over both."""
        weights = self.weights or other.weights
        if self.weights is not None and other.weights is not None:
            weights = self.weights.merge(other.weights)
        return DaySums(
            self.rows + other.rows,
            self.reward + other.reward,
            self.value.merge(other.value),
            weights,
        )

    def bounds(self, delta: float) -> tuple[float, float]:
        """Bounds on the mean reward, each wrong with probability at most delta / 2 over all
        readings."""
        low, high = self.value.reward_range
        interval = self.value.value(1.0 - delta)
        return within((interval.low, interval.high), (low, high))


def share_of_day(number: int) -> float:
    """Share of an error that belongs to the k-th day, from 1: 1 / (k (k + 1)), which sums to 1."""
    return 1.0 / (number * (number + 1))
