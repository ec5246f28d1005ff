"""Rows that a log may lack: the weights and rewards that an interval must allow for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from offtower.evaluation.intervals.statistics import Statistics, standard_error
from offtower.evaluation.intervals.term_mean import TermMean
from offtower.evaluation.rows import Array, EvaluationRows

BEYOND = 10.0
"""An unseen weight is at most so many times the largest one seen, unless a bound is declared."""


@dataclass(frozen=True)
class Span:
    """Least and largest value of an unseen row."""

    low: float
    high: float


def weight_span(weights: Statistics, max_weight: float | None = None) -> Span:
    """Weights of an unseen row, from statistics whose first term is the weight w.

    The largest is the largest of

    - E w^2 / E w, the mean weight of a row drawn in proportion to its weight;
    - two standard deviations above the mean, which is more where weights are near 1;
    - what the mean weight lacks, n (1 - mean w) less one standard error: the mean of w is 1, so
      that a lower one shows that large weights are missing.

    The first two are at most the largest weight seen, the third at most BEYOND times that; all at
    most max_weight where that is declared.
    """
    mean = float(weights.mean[0])
    if not mean > 0.0 or weights.n < 2:
        return Span(0.0, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        variance = float(weights.covariance[0, 0])
        beyond = mean + max(variance / mean, 2.0 * math.sqrt(variance))
    largest = float(weights.high[0])
    high = min(beyond, largest) if np.isfinite(beyond) else largest
    error = standard_error(TermMean(0, weights.mean.size), weights)
    missing = weights.n * (1.0 - mean - error)
    high = max(high, min(missing, BEYOND * largest))
    return Span(float(weights.low[0]), high if max_weight is None else min(high, max_weight))


def reward_span(rewards: Statistics, reward_range: tuple[float, float] | None = None) -> Span:
    """Rewards of an unseen row, from statistics whose first term is the reward: from the least to
    the largest seen; where all are equal, those of the declared range."""
    low, high = float(rewards.low[0]), float(rewards.high[0])
    if low == high and reward_range is not None:
        return Span(*reward_range)
    return Span(low, high)


def unseen_terms(
    terms: Callable[..., Array],
    weights: Sequence[Span],
    reward: Span,
    value: float,
    loggers: int = 1,
) -> Array:
    """(c, k) terms of the rows with every combination of extreme weights and rewards.

    terms: of an estimator, or of a difference of two policies. weights: of each policy.
    value: what any reward model is taken to predict, for the logged action and for the policy.
    loggers: number of behavior policies, each of which may have logged the row.
    """
    ends = [(span.low, span.high) for span in (*weights, reward)]
    corners = np.repeat(np.array(list(product(*ends))), loggers, axis=0)
    predicted = np.full(len(corners), min(max(value, reward.low), reward.high))
    logger = np.arange(len(corners)) % loggers
    rows = [
        EvaluationRows(
            corners[:, i],
            corners[:, -1],
            predicted,
            predicted,
            cluster_weight=corners[:, i],
            slate_weight=corners[:, i],
            logger=logger,
        )
        for i in range(len(weights))
    ]
    return terms(*rows)
