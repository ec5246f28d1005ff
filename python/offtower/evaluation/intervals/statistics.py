"""Mergeable sums over rows, from which an estimator's value and intervals follow.

An estimator is a smooth function of the means of a few per-row terms (for SNIPS: w and w r). Its
value, standard error, intervals and paired differences all follow from the count, the means and the
second moments of the terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, Protocol, TypeVar

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.intervals.linear import LinearFunctional
from offtower.evaluation.intervals.replicates import Replicates
from offtower.evaluation.intervals.row_groups import RowGroups
from offtower.evaluation.intervals.time_sums import TimeSums
from offtower.evaluation.intervals.user_sums import UserSums
from offtower.evaluation.rows import Array, EvaluationRows

_ROUNDING = 1e-13
_INFLUENCE_ROUNDING = 1e-14


class Functional(Protocol):
    """A smooth function of the means of k per-row terms."""

    @property
    def name(self) -> str: ...

    def combine(self, mean: Array) -> Array:
        """(..., k) means -> (...) values."""

    def gradient(self, mean: Array) -> Array:
        """(k,) means -> (k,) derivative of `combine`."""


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error (NaN for a single row) and the number of rows."""

    value: float
    std_error: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "std_error": self.std_error, "n": self.n}


@dataclass(frozen=True, eq=False)
class RowWeightSums:
    """What statistics of rows with weights v hold beside their sums.

    total, square: sums of v and of v^2. cross: (k,) sum of v^2 (t - mean).
    """

    total: float
    square: float
    cross: Array

    def around(self, scatter: Array, shift: Array) -> tuple[Array, Array]:
        """Scatter and cross around another mean, `shift` below this one."""
        mixed = np.outer(self.cross, shift)
        moved = scatter + mixed + mixed.T + self.square * np.outer(shift, shift)
        return moved, self.cross + self.square * shift


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mergeable sums of k terms over n rows.

    Rows may have known weights v_i, such as 1 / the share of such rows that a down-sampled log
    kept. Means are then self-normalized (Hajek 1971), and their covariance is that of a ratio:

        mean = sum_i v_i t_i / sum_i v_i
        var(mean) = n / (n - 1) sum_i v_i^2 (t_i - mean)(t_i - mean)^T / (sum_i v_i)^2

    Attributes:
        n: number of rows.
        total, carry: (k,) sum of the (weighted) terms and its rounding error so far (Neumaier
            1974), so that the value does not depend on the order and number of shards.
        scatter: (k, k) sum of (t - mean)(t - mean)^T, merged as in Chan, Golub and LeVeque (1983);
            times v^2 where rows have weights.
        weight_sum: sum of the importance weights; 0 means a log without support.
        low, high: (k,) least and largest term.
        users: sums by user, or None; memory grows with the number of users.
        replicates: bootstrap sums, or None.
        row_weights: of rows with weights; None where every row counts once.
        groups: sums by group of rows, or None.
        time: sums by bin of time, or None.
        found: what functions marked with `once` have computed from these sums.
    """

    n: int
    total: Array
    carry: Array
    scatter: Array
    weight_sum: float
    low: Array
    high: Array
    users: UserSums | None = None
    replicates: Replicates | None = None
    row_weights: RowWeightSums | None = None
    groups: RowGroups | None = None
    time: TimeSums | None = None
    found: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """The sums alone: what follows from them is computed again where they arrive."""
        return {**self.__dict__, "found": {}}

    @property
    def count(self) -> float:
        """Sum of the rows' weights; their number where they have none."""
        return self.n if self.row_weights is None else self.row_weights.total

    @cached_property
    def mean(self) -> Array:
        """(k,) means of the terms."""
        if self.n == 0:
            raise OfftowerError("there are no rows to estimate from")
        mean: Array = (self.total + self.carry) / self.count
        mean.setflags(write=False)
        return mean

    @property
    def covariance(self) -> Array:
        """(k, k) n times the covariance of the means (the sample covariance of rows without
        weights); NaN for a single row."""
        if self.n < 2:
            return np.full_like(self.scatter, np.nan)
        covariance = self.scatter / (self.n - 1)
        if self.row_weights is None:
            return covariance
        return np.asarray(covariance * (self.n / self.row_weights.total) ** 2)

    def select(self, columns: list[int], weight_sum: float | None = None) -> Statistics:
        """Statistics of some of the terms, in the order given."""
        users, replicates, weights = self.users, self.replicates, self.row_weights
        return replace(
            self,
            row_weights=None if weights is None else replace(weights, cross=weights.cross[columns]),
            total=self.total[columns],
            carry=self.carry[columns],
            scatter=self.scatter[np.ix_(columns, columns)],
            low=self.low[columns],
            high=self.high[columns],
            weight_sum=self.weight_sum if weight_sum is None else weight_sum,
            users=None if users is None else users.select(columns),
            replicates=None
            if replicates is None
            else replace(replicates, total=replicates.total[:, columns]),
            groups=None if self.groups is None else self.groups.select(columns),
            time=None if self.time is None else self.time.select(columns),
        )

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both shards' rows together."""
        if self.total.shape != other.total.shape:
            raise OfftowerError("statistics of different estimators cannot be merged")
        if (self.row_weights is None) != (other.row_weights is None):
            raise OfftowerError("all shards need the same options: rows with or without weights")
        if (self.users is None) != (other.users is None) or (self.replicates is None) != (
            other.replicates is None
        ):
            raise OfftowerError("all shards need the same options: users, bootstrap replicates")
        if (self.groups is None) != (other.groups is None):
            raise OfftowerError("all shards need the same options: sums by group of rows")
        if (self.time is None) != (other.time is None):
            raise OfftowerError("all shards need the same options: sums by time")
        total, error = _two_sum(self.total, other.total)
        n = self.n + other.n
        scatter = self.scatter + other.scatter
        row_weights = None
        if self.row_weights is not None and other.row_weights is not None:
            scatter, row_weights = _merged_weights(self, other)
        elif self.n and other.n:
            gap = self.mean - other.mean
            scatter = scatter + np.outer(gap, gap) * (self.n * other.n / n)
        users, replicates = self.users, self.replicates
        if users is not None and other.users is not None:
            users = users.merge(other.users)
        if replicates is not None and other.replicates is not None:
            replicates = replicates.merge(other.replicates)
        groups = self.groups
        if groups is not None and other.groups is not None:
            groups = groups.merge(other.groups)
        time = self.time
        if time is not None and other.time is not None:
            time = time.merge(other.time)
        return Statistics(
            n,
            total,
            self.carry + other.carry + error,
            scatter,
            self.weight_sum + other.weight_sum,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            users,
            replicates,
            row_weights,
            groups,
            time,
        )


def _merged_weights(one: Statistics, two: Statistics) -> tuple[Array, RowWeightSums]:
    """Scatter and weights of both around their common mean."""
    assert one.row_weights is not None and two.row_weights is not None
    if not (one.n and two.n):
        full = one if one.n else two
        assert full.row_weights is not None
        return full.scatter, full.row_weights
    total = one.row_weights.total + two.row_weights.total
    mean = (one.total + one.carry + two.total + two.carry) / total
    scatter, cross = one.row_weights.around(one.scatter, one.mean - mean)
    more, crossed = two.row_weights.around(two.scatter, two.mean - mean)
    square = one.row_weights.square + two.row_weights.square
    return scatter + more, RowWeightSums(total, square, cross + crossed)


def collect(
    terms: Array,
    rows: EvaluationRows,
    *,
    by_user: bool = False,
    replicates: int = 0,
    seed: int = 0,
    grouped: bool = False,
    timed: bool = False,
) -> Statistics:
    """Statistics of terms (n, k) of a shard; of their sums over each round of slates.

    Rows count by their `row_weight`, where they have one.
    by_user: also keep sums by user, and let bootstrap weights belong to users.
    replicates: number of bootstrap replicates to carry, 0 for none.
    grouped: also keep what gamma intervals need: sums by group of rows, unless there are users.
    timed: also keep sums by bin of time, where rows have times.
    Raises OfftowerError for by_user where the rows have no users.
    """
    if by_user and rows.user is None:
        raise OfftowerError(
            "an interval by user needs the 'user' column of the rows (user_id in the log's schema)"
        )
    terms = rows.summed(terms)
    n, k = terms.shape
    weight = rows.row_weight
    row_weights = None
    importance = float(rows.importance_weight.sum())
    if weight is None:
        total = terms.sum(axis=0)
        centered = terms - (total / n if n else total)
    else:
        # Equal columns have equal sums, which a matrix product does not promise.
        total, mass = (weight[:, None] * terms).sum(axis=0), float(weight.sum())
        centered = weight[:, None] * (terms - (total / mass if n else total))
        row_weights = RowWeightSums(mass, float(weight @ weight), weight @ centered)
        importance = float(weight @ rows.importance_weight)
    users = None
    if by_user and rows.user is not None:
        users = UserSums.of(rows.of_unit(rows.user), terms, weight)
    key = np.arange(n) if rows.row is None else rows.of_unit(rows.row)
    groups = None
    if grouped and users is None:
        groups = RowGroups.of(key, terms, weight)
    time = None
    if timed and rows.time is not None:
        unit = key if users is None or rows.user is None else rows.of_unit(rows.user)
        time = TimeSums.of(rows.of_unit(rows.time), unit, terms, weight)
    return Statistics(
        n,
        total,
        np.zeros(k),
        centered.T @ centered,
        importance,
        terms.min(axis=0, initial=np.inf),
        terms.max(axis=0, initial=-np.inf),
        users,
        Replicates.of(terms, rows, replicates, seed, by_user) if replicates else None,
        row_weights,
        groups,
        time,
    )


Found = TypeVar("Found")


def once(
    function: Callable[[Functional, Statistics], Found],
) -> Callable[[Functional, Statistics], Found]:
    """Keep what the function returns with the statistics: values, errors and intervals of one
    functional need the same fit and the same moments."""

    @wraps(function)
    def kept(functional: Functional, statistics: Statistics) -> Found:
        key = function, functional
        if key not in statistics.found:
            statistics.found[key] = function(functional, statistics)
        found: Found = statistics.found[key]
        return found

    return kept


@once
def fit(functional: Functional, statistics: Statistics) -> Functional:
    """The functional with the coefficients that it takes from the sums, by its method `fitted`; a
    functional without that method takes none."""
    fitted = getattr(functional, "fitted", None)
    return functional if fitted is None else fitted(statistics)


@once
def finish(functional: Functional, statistics: Statistics) -> Estimate:
    """Value and delta-method standard error; by user where the statistics hold users."""
    mean, functional = statistics.mean, fit(functional, statistics)
    value = float(functional.combine(mean))
    return Estimate(value, standard_error(functional, statistics), statistics.n)


def standard_error(functional: Functional, statistics: Statistics) -> float:
    """sqrt(g' S g / n) with g the gradient at the means; clustered where there are users.

    Infinite where the second moments overflow.
    """
    if statistics.n < 2:
        return float("nan")
    mean, functional = statistics.mean, fit(functional, statistics)
    slope = functional.gradient(mean)
    factor = functional.error_factor if isinstance(functional, LinearFunctional) else 1.0
    if statistics.users is not None:
        return factor * _clustered_error(slope, mean, statistics.users, statistics.count)
    covariance = statistics.covariance
    variance = float(slope @ covariance @ slope)
    if not np.isfinite(statistics.scatter).all():
        return float("inf")
    # What is left of terms that cancel, such as those of two equal policies, may be rounding.
    scale = float(np.abs(slope) @ np.sqrt(np.diagonal(covariance))) ** 2
    if variance > _ROUNDING * scale:
        return factor * float(np.sqrt(variance / statistics.n))
    return factor * _canceled_error(slope, statistics)


def _canceled_error(slope: Array, statistics: Statistics) -> float:
    """Standard error where the variance is below the rounding of second moments, as that of SNIPS
    for rewards of 1e6 and 1e6 + 1: from the influences of groups of rows, whose rounding is
    relative to the terms and not to their squares. 0 where that is all that they hold."""
    groups, mean = statistics.groups, statistics.mean
    if groups is None:
        return 0.0
    influence = (groups.total - groups.count[:, None] * mean) @ slope
    terms = (np.abs(groups.total) + groups.count[:, None] * np.abs(mean)) @ np.abs(slope)
    square = float(influence @ influence)
    if not square > _INFLUENCE_ROUNDING**2 * float(terms @ terms):
        return 0.0
    units = int(np.count_nonzero(groups.count))
    return float(np.sqrt(square * units / max(1, units - 1))) / statistics.count


def _clustered_error(slope: Array, mean: Array, users: UserSums, n: float) -> float:
    """Root of G/(G-1) sum_u S_u^2 / n^2, S_u the sum of a user's influences (by row weights, as n
    is then their sum)."""
    run = users.compact().runs[0]
    groups = run.key.size
    if groups < 2:
        return float("nan")
    influence = (run.total - run.count[:, None] * mean) @ slope
    return float(np.sqrt(groups / (groups - 1.0) * np.sum(influence**2)) / n)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b as a rounded sum and its exact rounding error (Knuth)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)
