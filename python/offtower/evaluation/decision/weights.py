"""Diagnostics of importance weights, as sums that merge over shards."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from offtower.evaluation.intervals.statistics import Statistics, collect, standard_error
from offtower.evaluation.intervals.term_mean import TermMean
from offtower.evaluation.rows import Array, EvaluationRows

KEPT_WEIGHTS = 200_000
"""Largest weights kept of a log: the top 0.1 % of up to 2e8 rows."""

TOP_SHARE = 0.001


@dataclass(frozen=True)
class WeightDiagnostics:
    """Diagnostics of the importance weights; w stands for w_i v_i / mean v of rows with weights.

    Attributes:
        effective_sample_size: (sum w)^2 / sum w^2 (Kish 1965), and as a share of n.
        mean, mean_std_error, mean_z: mean weight; 1 in expectation for true propensities and full
            support. Also below 1 where the heavy tail of the weights was not sampled.
        top_share: share of the total weight on the 0.1 % of rows with the largest weights.
        pareto_k: shape of the tail (`pareto_shape`); None where there is no tail to fit.
        zero_share: rows with weight 0.
        balance, balance_std_error, balance_z: mean of w (q(x,a) - E_pi q(x,.)), 0 in expectation
            for any q; None without a reward model. It detects propensities that are right on
            average and wrong between items.
    """

    n: int
    effective_sample_size: float
    effective_share: float
    mean: float
    mean_std_error: float
    mean_z: float | None
    max: float
    top_share: float
    pareto_k: float | None
    zero_share: float
    balance: float | None = None
    balance_std_error: float | None = None
    balance_z: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class WeightSums:
    """Mergeable sums for `WeightDiagnostics`; terms are w and, with a reward model, w (q - m)."""

    statistics: Statistics
    square: float
    zeros: int
    top: Array

    @classmethod
    def of(cls, rows: EvaluationRows, by_user: bool = False) -> WeightSums:
        """Sums over a shard; of slates, of each round's mean weight over its positions."""
        terms = [rows.mean_weight]
        if rows.action_reward is not None and rows.expected_reward is not None:
            terms.append(_balance(rows, rows.action_reward, rows.expected_reward))
        weight = rows.summed(rows.mean_weight)
        if rows.row_weight is not None:
            weight = weight * rows.row_weight
        return cls(
            collect(np.stack(terms, axis=1), rows, by_user=by_user),
            float(weight @ weight),
            int(np.count_nonzero(weight == 0.0)),
            _largest(weight, KEPT_WEIGHTS),
        )

    def merge(self, other: WeightSums) -> WeightSums:
        """Sums over both shards."""
        return WeightSums(
            self.statistics.merge(other.statistics),
            self.square + other.square,
            self.zeros + other.zeros,
            _largest(np.concatenate([self.top, other.top]), KEPT_WEIGHTS),
        )

    def finish(self) -> WeightDiagnostics:
        """The diagnostics. Raises OfftowerError without rows."""
        sums = self.statistics
        mean = sums.mean
        n, total = sums.n, float(mean[0]) * sums.count
        error = standard_error(TermMean(0, mean.size), sums)
        count = min(self.top.size, max(1, math.ceil(TOP_SHARE * n)))
        ess = (total / math.sqrt(self.square)) ** 2 if self.square > 0.0 else 0.0
        if math.isinf(self.square):  # Only the largest weights count beside such.
            shares = self.top / self.top.max()
            ess = float(shares.sum() ** 2 / (shares @ shares))
        balance = balance_error = None
        if mean.size > 1:
            balance = float(mean[1])
            balance_error = standard_error(TermMean(1, mean.size), sums)
        return WeightDiagnostics(
            n=n,
            effective_sample_size=ess,
            effective_share=ess / n,
            mean=float(mean[0]),
            mean_std_error=error,
            mean_z=_z(float(mean[0]) - 1.0, error),
            max=float(self.top.max(initial=0.0)) * (n / sums.count),
            top_share=float(_largest(self.top, count).sum()) / total if total > 0.0 else 0.0,
            pareto_k=pareto_shape(self.top, n),
            zero_share=self.zeros / n,
            balance=balance,
            balance_std_error=balance_error,
            balance_z=None if balance is None else _z(balance, balance_error),
        )


def _balance(rows: EvaluationRows, action_reward: Array, expected_reward: Array) -> Array:
    """(n,) terms of mean 0 for any q; of slates w_{1:k} q_k - w_{1:k-1} E_pi[q | x, a_<k]."""
    weight = rows.importance_weight
    if rows.rounds is None or rows.earlier_weight is None:
        return np.asarray(weight * (action_reward - expected_reward))
    return np.asarray(weight * action_reward - rows.earlier_weight * expected_reward)


@dataclass(frozen=True)
class PositionWeight:
    """Mean importance weight of one position of the slates: 1 in expectation.

    n: rounds that have the position. z: distance of the mean from 1 in standard errors.
    """

    position: int
    n: int
    mean: float
    std_error: float | None
    z: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class PositionSums:
    """Mergeable sums of weights by position: rounds, mean, and squared deviations, each (K,)."""

    n: Array
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, rows: EvaluationRows) -> PositionSums | None:
        """Sums over a shard; None for rows that are no slates."""
        if rows.rounds is None:
            return None
        position, weight = rows.rounds.position, rows.importance_weight
        n = np.bincount(position).astype(np.float64)
        mean = np.bincount(position, weight) / n
        scatter = np.bincount(position, (weight - mean[position]) ** 2)
        return cls(n, mean, scatter.astype(np.float64))

    def merge(self, other: PositionSums) -> PositionSums:
        """Sums over both shards (Chan, Golub and LeVeque 1983)."""
        size = max(self.n.size, other.n.size)
        a, b = self._padded(size), other._padded(size)
        n = a.n + b.n
        gap = b.mean - a.mean
        mean = a.mean + gap * b.n / n
        return PositionSums(n, mean, a.scatter + b.scatter + gap**2 * a.n * b.n / n)

    def finish(self) -> tuple[PositionWeight, ...]:
        """By position."""
        found = []
        for k in range(self.n.size):
            n, mean = int(self.n[k]), float(self.mean[k])
            error = math.sqrt(float(self.scatter[k]) / (n - 1) / n) if n > 1 else None
            found.append(PositionWeight(k, n, mean, error, _z(mean - 1.0, error)))
        return tuple(found)

    def _padded(self, size: int) -> PositionSums:
        more = (0, size - self.n.size)
        return PositionSums(*(np.pad(x, more) for x in (self.n, self.mean, self.scatter)))


def pareto_shape(largest: Array, n: int) -> float | None:
    """Shape k of a generalized Pareto tail: beyond 0.5 the variance is infinite, 0.7 is too much.

    largest: the largest weights of n, at least 3 sqrt(n) of them. Tail of min(n / 5, 3 sqrt(n))
    weights; fit of Zhang and Stephens (2009) with the prior of Vehtari, Simpson, Gelman, Yao and
    Gabry (JMLR 2024, appendix G). None where the tail has fewer than 5 different weights.
    """
    size = int(min(0.2 * n, 3.0 * math.sqrt(n), largest.size - 1))
    if size < 5:
        return None
    tail = np.sort(_largest(largest, size + 1))
    excess = tail[1:] - tail[0]
    excess = excess[excess > 1e-12 * tail[-1]]
    if np.unique(excess).size < 5:
        return None
    m = excess.size
    points = 30 + int(math.sqrt(m))
    grid = 1.0 - np.sqrt(points / (np.arange(1, points + 1) - 0.5))
    theta = 1.0 / excess[-1] + grid / (3.0 * excess[int(m / 4 + 0.5) - 1])
    shape = np.array([np.log1p(-t * excess).mean() for t in theta])
    profile = m * (np.log(-theta / shape) - shape - 1.0)
    mix = np.exp(profile - logsumexp(profile))
    k = float(np.log1p(-float(mix @ theta) * excess).mean())
    return float((m * k + 5.0) / (m + 10.0))


def _largest(values: Array, count: int) -> Array:
    if values.size <= count:
        return values
    return np.partition(values, values.size - count)[values.size - count :]


def _z(distance: float, error: float | None) -> float | None:
    if error is None or not error > 0.0:
        return None
    return distance / error
