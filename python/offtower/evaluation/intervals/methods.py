"""Confidence intervals from merged statistics.

| method          | holds for                 | needs                                    |
|-----------------|---------------------------|------------------------------------------|
| `gamma`         | small n, skewed terms     | sums by user, or by group of rows        |
| `normal`        | large n                   | second moments                           |
| `bootstrap`     | large n, skewed terms     | replicate sums (Poisson weights)         |
| `bernstein`     | every n, independent rows | range of the terms: reward, weight       |
| `log_smoothing` | every n, independent rows | sums of logarithms (`smoothing_bound`)   |
| `betting`       | every n, independent rows | all rows in memory (`betting`)           |

`gamma`, `normal` and `bootstrap` are by user where the statistics hold users. `gamma` is the
default: docs/results/2026-11-30-validity.md has the coverage of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from offtower.errors import OfftowerError, UndefinedIntervalError
from offtower.evaluation.intervals.statistics import Functional, Statistics, finish, fit

METHODS = ("gamma", "normal", "bootstrap", "bernstein", "log_smoothing", "betting")
DEFAULT_METHOD = "gamma"
"""What "auto" stands for, chosen by coverage in docs/results/2026-11-30-validity.md."""
DEFAULT_REPLICATES = 1000


@dataclass(frozen=True)
class Interval:
    """A two-sided interval that covers with the stated confidence.

    rows_needed: of a log for which the interval would be of useful width, about; None where it is.
    """

    low: float
    high: float
    confidence: float
    method: str
    by_user: bool = False
    rows_needed: int | None = None

    def shifted(self, by: float) -> Interval:
        """The interval moved by a constant."""
        return replace(self, low=self.low + by, high=self.high + by)

    def within(self, low: float, high: float) -> Interval:
        """The interval cut to possible values; moved to the nearest of them where it holds none."""
        ends, width = (self.low, self.high), self.high - self.low
        if self.low > high:
            ends = (high - width, high)
        elif self.high < low:
            ends = (low, low + width)
        return replace(self, low=max(ends[0], low), high=min(ends[1], high))

    def to_dict(self) -> dict[str, Any]:
        needed = {} if self.rows_needed is None else {"rows_needed": self.rows_needed}
        return {
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "method": self.method,
            "by_user": self.by_user,
            **needed,
        }


def check_confidence(confidence: float) -> float:
    """Return the confidence. Raises OfftowerError unless it lies between 0 and 1."""
    if not 0.0 < confidence < 1.0:
        raise OfftowerError(f"confidence must lie between 0 and 1 (such as 0.95): {confidence}")
    return confidence


def check_method(method: str) -> str:
    """Return the method. Raises OfftowerError for an unknown one."""
    if method not in METHODS:
        raise OfftowerError(f"unknown interval method {method!r}; use one of {', '.join(METHODS)}")
    return method


def simultaneous_confidence(confidence: float, comparisons: int) -> float:
    """Level of each of several intervals at which all cover at once (Bonferroni)."""
    return 1.0 - (1.0 - check_confidence(confidence)) / max(1, comparisons)


def normal_interval(
    functional: Functional, statistics: Statistics, confidence: float = 0.95
) -> Interval:
    """Value +- t * standard error: Student's t with n - 1 degrees, or users - 1 where clustered."""
    need_rows(statistics)
    estimate = finish(functional, statistics)
    users = statistics.users
    units = statistics.n if users is None else users.count
    if units < 2:
        raise OfftowerError("an interval by user needs at least two users; the rows have one")
    half = float(stdtrit(units - 1, 0.5 + check_confidence(confidence) / 2)) * estimate.std_error
    return Interval(
        estimate.value - half, estimate.value + half, confidence, "normal", users is not None
    )


def bootstrap_interval(
    functional: Functional, statistics: Statistics, confidence: float = 0.95
) -> Interval:
    """Percentiles of the estimator over the replicates that the statistics carry.

    Raises OfftowerError for fewer than 10 / (1 - confidence) replicates, which leave too few beyond
    the percentile; UndefinedIntervalError where many replicates have no value.
    """
    need_rows(statistics)
    sums = statistics.replicates
    if sums is None:
        raise OfftowerError(
            "the statistics carry no bootstrap replicates; collect them with replicates=1000"
        )
    tail = 1.0 - check_confidence(confidence)
    if sums.weight.size < 10.0 / tail - 1e-9:
        raise OfftowerError(
            f"{sums.weight.size} bootstrap replicates are too few for confidence "
            f"{confidence:g}; use at least {math.ceil(10.0 / tail - 1e-9)}"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        values = fit(functional, statistics).combine(sums.total / sums.weight[:, None])
    values = values[np.isfinite(values)]
    if values.size < 0.9 * sums.weight.size:
        raise UndefinedIntervalError(
            "more than a tenth of the bootstrap replicates have no value: too few rows carry a "
            "weight above 0. Log more rows, or leave out such policies (greedy ones, for instance)"
        )
    low, high = np.quantile(values, [tail / 2, 1.0 - tail / 2])
    return Interval(float(low), float(high), confidence, "bootstrap", sums.by_user)


def bernstein_interval(
    functional: Functional,
    statistics: Statistics,
    bounds: tuple[float, float],
    confidence: float = 0.95,
) -> Interval:
    """Empirical Bernstein interval of a mean of terms in `bounds` (Maurer and Pontil 2009, thm 4).

    With probability at least 1 - delta, for each side,
    |E t - mean t| <= sqrt(2 S^2 L / n) + 7 (high - low) L / (3 (n - 1)), L = log(2 / delta), delta
    half of 1 - confidence. It covers the mean of the terms: for a biased estimator that is not the
    policy's value.
    Raises OfftowerError where a term is seen outside the bounds, or rows are clustered by user.
    """
    need_rows(statistics)
    _independent(statistics, "bernstein")
    low, high = bounds
    slope = functional.gradient(statistics.mean)
    if slope.size != 1:
        raise OfftowerError(f"{functional.name} is not a mean of bounded terms: no bernstein")
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    if statistics.low[0] < low - slack or statistics.high[0] > high + slack:
        raise OfftowerError(
            f"terms of {functional.name} reach from {statistics.low[0]:g} to "
            f"{statistics.high[0]:g}, outside of what reward_range and max_weight allow "
            f"({low:g} to {high:g}); correct those, or the reward model's predictions"
        )
    n = statistics.n
    log_term = math.log(4.0 / (1.0 - check_confidence(confidence)))
    variance = float(statistics.covariance[0, 0])
    half = math.sqrt(2.0 * variance * log_term / n)
    half += 7.0 * (high - low) * log_term / (3.0 * (n - 1))
    value = finish(functional, statistics).value
    return Interval(max(low, value - half), min(high, value + half), confidence, "bernstein")


def round_up(rows: float) -> int:
    """To two digits."""
    unit = 10.0 ** max(0, math.floor(math.log10(rows)) - 1)
    return int(math.ceil(rows / unit) * unit)


def need_rows(statistics: Statistics) -> None:
    """Raises OfftowerError for fewer than two rows."""
    if statistics.n < 2:
        raise OfftowerError(
            f"an interval needs at least two rows; there {'is' if statistics.n else 'are'} "
            f"{statistics.n}"
        )


def _independent(statistics: Statistics, method: str) -> None:
    if statistics.row_weights is not None:
        raise OfftowerError(
            f"a {method} interval has no form for rows with weights; use 'normal' or 'bootstrap'"
        )
    if statistics.users is not None:
        raise OfftowerError(
            f"a {method} interval assumes independent rows and has no form by user; "
            "use 'normal' or 'bootstrap' by user"
        )
