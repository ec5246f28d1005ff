"""Gamma intervals: correct for skewness and for a row that the log may lack.

For a weighted sum of Poisson counts, Fay and Feuer (1997, Statistics in Medicine 16) take limits
from gamma distributions: with total S and sum of squares V, the lower limit is a quantile of the
gamma distribution of mean S and variance V; for the upper limit one more count of the largest
weight d is added, mean S + d and variance V + d^2. For equal weights these are the exact limits of
Garwood (1936), also for no count at all.

Here the sum is that of any functional's influences X_i, which may be of both signs. Each limit is a
quantile of the shifted gamma (Pearson type III) distribution with

    mean n value + d,  variance V + d^2,  skewness 2 (K + d^3) / (V + d^2)^(3/2),

V = sum X_i^2, K = sum X_i^3 and d the influence of an unseen row, negative for the lower limit.
The skewness is twice that of the sum, as in the second-order correction of a studentized mean for
skewness (Hall 1992, "On the removal of skewness by transformation"),

    value + s (z + (2 z^2 + 1) K / (6 V^(3/2))),

from which the limits differ by a shift of K / (2 V), which lies between 0 and d for counts.

The normal quantile is replaced by Student's with min(n, 3 V^2 / sum X_i^4) - 1 degrees of freedom:
an effective number of units, n for normal influences and few where few units carry the variance
(compare Carter, Schnepel and Steigerwald 2017 for clusters).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammainccinv, gammaincinv, ndtr, stdtrit

from offtower.errors import OfftowerError
from offtower.evaluation.intervals.methods import (
    Interval,
    check_confidence,
    need_rows,
    round_up,
)
from offtower.evaluation.intervals.statistics import Functional, Statistics, finish, fit, once
from offtower.evaluation.rows import Array

USEFUL = 3.0
"""An interval that reaches farther than so many times the normal one is of no useful width."""
_SMALL_SKEWNESS = 1e-3
"""Below it the first terms of Cornish and Fisher's expansion are exact to 1e-6."""
_FAR = 37.0
"""Phi(-z) is above 0 in double precision up to here."""
_LEAST_UNITS = 2.5
"""Effective units, at least: 1.5 degrees of freedom."""


@dataclass(frozen=True)
class InfluenceMoments:
    """Sums over units (rows, groups of rows, or users) of a functional's influences X / scale.

    rows: number of rows, or sum of their weights. units: of them, effective in the fourth moment.
    """

    rows: float
    units: float
    effective: float
    scale: float
    second: float
    third: float
    low: float
    high: float

    @staticmethod
    @once
    def of(functional: Functional, statistics: Statistics) -> InfluenceMoments | None:
        """The moments; None where the functional does not vary between rows."""
        functional = fit(functional, statistics)
        count, total = unit_sums(statistics)
        error = finish(functional, statistics).std_error * statistics.count
        mean = statistics.mean
        influence = (total - count[:, None] * mean) @ functional.gradient(mean)
        scale = float(np.abs(influence).max())
        if not error > 0.0 or not scale > 0.0:
            return None
        influence, units = influence / scale, float(influence.size)
        square = influence * influence
        correction = units / (units - 1.0)
        second = (error / scale) ** 2
        return InfluenceMoments(
            statistics.count,
            units,
            min(units, max(_LEAST_UNITS, 3.0 * second**2 / float(square @ square))),
            scale,
            second,
            float(square @ influence) * correction,
            float(influence.min()),
            float(influence.max()),
        )

    def inflation(self, distance: float, tail: float) -> float:
        """Distance of a limit from the value, over that of the normal interval."""
        normal = float(stdtrit(self.units - 1.0, 1.0 - tail)) * math.sqrt(self.second)
        return distance * self.rows / (self.scale * normal)

    def rows_needed(self, unseen: float, seen: int) -> int:
        """Rows of a log in which an unseen row weighs a quarter of a standard error."""
        added = max(abs(unseen) / self.scale, self.high, -self.low)
        return round_up(seen * (4.0 * added) ** 2 / self.second)

    def limit(self, tail: float, unseen: float) -> float:
        """Distance of a limit from the value; the lower one for an unseen influence below 0.

        tail: probability beyond the limit. unseen: influence of an unseen row, at least as far out
        as the most extreme unit.
        """
        added = unseen / self.scale
        upper = added > 0.0
        added = max(added, self.high) if upper else min(added, self.low)
        variance = self.second + added**2
        skewness = 2.0 * (self.third + added**3) / variance**1.5
        z = float(stdtrit(self.effective - 1.0, 1.0 - tail))
        standard = _pearson_quantile(z if upper else -z, skewness)
        return self.scale * (added + math.sqrt(variance) * standard) / self.rows


def gamma_interval(
    functional: Functional,
    statistics: Statistics,
    confidence: float = 0.95,
    unseen: Array | None = None,
) -> Interval:
    """Gamma interval; by user where the statistics hold users.

    unseen: (c, k) terms of rows that the log may lack (`unseen.UnseenRows`); those of the least and
        the largest influence are used. None uses the most extreme units seen.

    A functional that does not vary between rows gets the exact binomial limits for an event that
    none of the units shows.
    """
    need_rows(statistics)
    functional = fit(functional, statistics)
    estimate = finish(functional, statistics)
    value = estimate.value
    tail = (1.0 - check_confidence(confidence)) / 2.0
    by_user = statistics.users is not None
    if not math.isfinite(estimate.std_error):
        return Interval(-math.inf, math.inf, confidence, "gamma", by_user)
    low = high = 0.0
    if unseen is not None:
        influence = (unseen - statistics.mean) @ functional.gradient(statistics.mean)
        low, high = min(0.0, float(influence.min())), max(0.0, float(influence.max()))
    moments = InfluenceMoments.of(functional, statistics)
    if moments is None:
        share = -math.expm1(math.log(tail) / _units(statistics))
        return Interval(value + share * low, value + share * high, confidence, "gamma", by_user)
    ends = moments.limit(tail, min(low, -1e-300)), moments.limit(tail, max(high, 1e-300))
    needed = None
    if moments.inflation(max(-ends[0], ends[1]), tail) > USEFUL:
        needed = moments.rows_needed(max(-low, high), statistics.n)
    return Interval(value + ends[0], value + ends[1], confidence, "gamma", by_user, needed)


def unit_sums(statistics: Statistics) -> tuple[Array, Array]:
    """Rows (u,) and sums of terms (u, k) of the independent units: users, else groups of rows."""
    if statistics.users is not None:
        run = statistics.users.compact().runs[0]
        if run.key.size < 2:
            raise OfftowerError("an interval by user needs at least two users; the rows have one")
        return run.count, run.total
    if statistics.groups is None:
        raise OfftowerError(
            "the statistics carry no sums by group of rows; collect them with grouped=True"
        )
    kept = statistics.groups.count > 0.0
    return statistics.groups.count[kept], statistics.groups.total[kept]


def _units(statistics: Statistics) -> int:
    return statistics.n if statistics.users is None else statistics.users.count


def _pearson_quantile(z: float, skewness: float) -> float:
    """Quantile of the standardized Pearson type III distribution at the probability Phi(z)."""
    if abs(skewness) < _SMALL_SKEWNESS:
        return z + skewness * (z * z - 1.0) / 6.0
    if abs(z) > _FAR:  # Student's t of few units: beyond it in proportion.
        return _pearson_quantile(math.copysign(_FAR, z), skewness) * abs(z) / _FAR
    shape = 4.0 / skewness**2
    if skewness < 0.0:
        return -_pearson_quantile(-z, -skewness)
    # The smaller tail keeps its digits.
    quantile = gammaincinv(shape, ndtr(z)) if z < 0.0 else gammainccinv(shape, ndtr(-z))
    return (float(quantile) - shape) * skewness / 2.0
