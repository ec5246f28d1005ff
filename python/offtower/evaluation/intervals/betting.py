"""Intervals by betting, for IPS on independent rows in memory: they hold for every number of rows.

For terms Z >= 0 of mean at most m given the earlier ones, and bets 0 <= lambda_i <= c / m that
depend on the earlier ones only, prod_i (1 + lambda_i (Z_i - m)) is a nonnegative supermartingale,
which exceeds 1 / alpha at some time with probability at most alpha (Ville 1939). The lower limit is
the largest m that it refutes. Bets follow the variance so far, lambda_i = sqrt(2 log(1 / alpha) /
(n v_{i-1})). Source: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by
betting".

Z = w (r - a) gives the lower limit of a value, and Z = w (b - r) the upper one, since the mean
weight is 1; neither needs a largest weight. The logarithmic-smoothing bound mixes fixed bets
instead, so that its sums merge over shards; bets that follow the rows do not.
"""

from __future__ import annotations

import math

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.intervals.methods import Interval, check_confidence
from offtower.evaluation.intervals.smoothing_bound import check_range, unit_rewards, within
from offtower.evaluation.rows import Array, EvaluationRows

_LARGEST = 0.75
"""c: a bet loses at most this share of the capital."""
_HALVINGS = 40
"""Of the range, for a limit."""


def betting_interval(
    rows: EvaluationRows, confidence: float, reward_range: tuple[float, float]
) -> Interval:
    """Interval of V(new) by IPS; each side fails with probability at most (1 - confidence) / 2.

    Raises OfftowerError for a reward outside the range, and without rows.
    """
    if rows.n < 1:
        raise OfftowerError("there are no rows to estimate from")
    tail = (1.0 - check_confidence(confidence)) / 2.0
    low, high = check_range(reward_range)
    weight, above = rows.importance_weight, unit_rewards(rows.reward, reward_range)
    ends = (
        low + (high - low) * _lower_limit(weight * above, tail),
        high - (high - low) * _lower_limit(weight * (1.0 - above), tail),
    )
    return Interval(*within(ends, (low, high)), confidence, "betting")


def _lower_limit(terms: Array, alpha: float) -> float:
    """Largest mean in [0, 1] that the terms refute from below."""
    n = terms.size
    count = np.arange(1.0, n + 1.0)
    mean = (0.5 + np.cumsum(terms)) / (count + 1.0)
    variance = (0.25 + np.cumsum((terms - mean) ** 2)) / (count + 1.0)
    before = np.concatenate([[0.25], variance[:-1]])
    bet = np.sqrt(2.0 * math.log(1.0 / alpha) / (n * before))

    def refuted(m: float) -> bool:
        capital = np.cumsum(np.log1p(np.minimum(bet, _LARGEST / m) * (terms - m)))
        return bool(capital.max(initial=-math.inf) >= math.log(1.0 / alpha))

    # The capital falls with m, since min(lambda, c / m) (Z - m) does.
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
