"""Bounds on a policy's value that hold for every n and every tail of the weights.

For numbers Z > -1/lambda, independent with mean mu, E prod (1 + lambda Z_i) / (1 + lambda mu) = 1,
so that by Markov's inequality, with probability at least 1 - delta,

    mean log(1 + lambda Z) <= log(1 + lambda mu) + log(1/delta) / n .

Solved for mu with Z = w r it is the logarithmic-smoothing bound of Sakhi, Aouali, Alquier and
Chopin (NeurIPS 2024, "Logarithmic Smoothing for Pessimistic Off-Policy Evaluation, Selection and
Learning"; there for costs in [-1, 0]): with V_lambda = mean log(1 + lambda w r) / lambda,

    mu >= (exp(lambda V_lambda - log(1/delta) / n) - 1) / lambda .

Two changes. lambda must not depend on the log; instead of fixing one, the average of the products
over a fixed grid of lambda is used: its mean is 1 too, so Markov's inequality holds for it, at a
cost of at most log(grid) / n. And rewards are shifted by the ends of their range [a, b]:

    V(new) - a            >= E w (r - a)              Z = w (r - a) >= 0
    b - V(new)            >= E w (b - r)              Z = w (b - r) >= 0
    V(new) - V(logging)   >= E (w - 1)(r - a)         Z >= -(b - a)
    V(logging) - V(new)   >= E (w - 1)(b - r)         Z >= -(b - a)

with equality under full support. No largest weight enters. Z = w gives a lower bound on the mean
weight, which is at most 1: where the bound exceeds 1, the propensities are wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from offtower.errors import OfftowerError
from offtower.evaluation.intervals.methods import Interval, check_confidence
from offtower.evaluation.rows import Array, EvaluationRows

GRID = 0.9 * 0.5 ** np.arange(16)
"""lambda times the width of the reward range: from 0.9 to 2.7e-5, apt for up to about 1e9 rows."""

_FAR = 1e308
"""Sample means beyond it overflow."""
_KINDS = ("value_low", "value_high", "difference_low", "difference_high", "mean_weight")


@dataclass(frozen=True, eq=False)
class SmoothingSums:
    """Mergeable sums of log(1 + lambda Z): (5, grid), one row for each bound above."""

    n: int
    log_sum: Array
    total: Array
    reward_range: tuple[float, float]

    @classmethod
    def of(cls, rows: EvaluationRows, reward_range: tuple[float, float]) -> SmoothingSums:
        """Sums over a shard. Raises OfftowerError for a reward outside the range."""
        weight, above = rows.importance_weight, unit_rewards(rows.reward, reward_range)
        below = 1.0 - above
        kinds = (
            weight * above,
            weight * below,
            (weight - 1.0) * above,
            (weight - 1.0) * below,
            weight,
        )
        log_sum = np.array([[np.log1p(lam * z).sum() for lam in GRID] for z in kinds])
        return cls(rows.n, log_sum, np.array([z.sum() for z in kinds]), check_range(reward_range))

    def merge(self, other: SmoothingSums) -> SmoothingSums:
        """Sums over both shards."""
        if self.reward_range != other.reward_range:
            raise OfftowerError("shards were summed with different reward ranges")
        return SmoothingSums(
            self.n + other.n,
            self.log_sum + other.log_sum,
            self.total + other.total,
            self.reward_range,
        )

    def value(self, confidence: float = 0.95) -> Interval:
        """Interval of V(new); each side fails with probability at most (1 - confidence) / 2."""
        low, high = self.reward_range
        tail = (1.0 - check_confidence(confidence)) / 2
        ends = (
            low + (high - low) * self.lower_bound("value_low", tail),
            high - (high - low) * self.lower_bound("value_high", tail),
        )
        return Interval(*within(ends, (low, high)), confidence, "log_smoothing")

    def difference(self, confidence: float = 0.95) -> Interval:
        """Interval of V(new) - V(logging), from one paired bound for each side."""
        low, high = self.reward_range
        tail = (1.0 - check_confidence(confidence)) / 2
        ends = (
            (high - low) * self.lower_bound("difference_low", tail),
            -(high - low) * self.lower_bound("difference_high", tail),
        )
        return Interval(*within(ends, (low - high, high - low)), confidence, "log_smoothing")

    def mean_weight(self, delta: float = 1e-4) -> float:
        """Lower bound on the mean weight, wrong with probability at most delta; should be <= 1."""
        return self.lower_bound("mean_weight", delta)

    def lower_bound(self, kind: str, delta: float) -> float:
        """One-sided bound on E Z in units of the reward's width; 1 - delta is its confidence."""
        if self.n < 1:
            raise OfftowerError("there are no rows to estimate from")
        i = _KINDS.index(kind)
        floor = -1.0 if kind.startswith("difference") else 0.0
        target = math.log(1.0 / delta) + math.log(GRID.size)

        def excess(mu: float) -> float:
            exponent = self.log_sum[i] - self.n * np.log1p(GRID * mu)
            top = float(exponent.max())
            return top + math.log(float(np.exp(exponent - top).sum())) - target

        # At the sample mean every product is at most 1 (Jensen), so the root lies below it.
        right = min(float(self.total[i]) / self.n, _FAR)
        if right <= floor or excess(floor) <= 0.0:
            return floor
        # On a logarithmic scale, on which means of any size are near.
        far = math.log1p(right - floor)
        root = brentq(lambda u: excess(floor + math.expm1(u)), 0.0, far, xtol=1e-14, rtol=1e-14)
        return floor + math.expm1(float(root))


def within(ends: tuple[float, float], possible: tuple[float, float]) -> tuple[float, float]:
    """Clip to the possible range; return all of it where the bounds contradict each other.

    That only happens where the weights are no ratios of probabilities (`SmoothingSums.mean_weight`
    detects this).
    """
    low, high = max(ends[0], possible[0]), min(ends[1], possible[1])
    return (low, high) if low <= high else possible


def unit_rewards(reward: Array, reward_range: tuple[float, float]) -> Array:
    """(n,) rewards in units of the range, from 0 to 1.

    Raises OfftowerError for a reward outside the range.
    """
    low, high = check_range(reward_range)
    slack = 1e-6 * max(high - low, abs(low), abs(high))  # rewards kept as float32
    outside = (reward < low - slack) | (reward > high + slack)
    if outside.any():
        first = int(np.argmax(outside))
        raise OfftowerError(
            f"reward[{first}] is {reward[first]:g}, outside of the reward range "
            f"[{low:g}, {high:g}] ({int(outside.sum())} such values); correct reward_range"
        )
    return np.clip((reward - low) / (high - low), 0.0, 1.0)


def check_range(reward_range: tuple[float, float]) -> tuple[float, float]:
    """The range as floats. Raises OfftowerError unless it is finite and low < high."""
    low, high = (float(end) for end in reward_range)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise OfftowerError(f"reward_range must be (low, high) with low < high: {reward_range}")
    return low, high
