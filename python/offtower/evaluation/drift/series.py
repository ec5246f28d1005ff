"""A value by cell of time, with the noise of rows in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from offtower.evaluation.drift.grid import TimeGrid
from offtower.evaluation.intervals.linear import LinearFunctional
from offtower.evaluation.intervals.statistics import Functional, Statistics, finish, fit
from offtower.evaluation.intervals.time_sums import TimeSums
from offtower.evaluation.rows import Array

_PRIOR_DEGREES = 30.0
"""The noise of a period's rows is drawn to that of all as by so many degrees of freedom."""


@dataclass(frozen=True, eq=False)
class Series:
    """A value over time.

    It is linear in the rows: value + the mean influence of a cell's rows, so that the mean over all
    rows is the value by the whole log.

    Attributes:
        value: (m,) by cell. mass: (m,) rows, by their weights where they have any.
        noise: (m,) variance of `value` by the noise of rows that are independent given their time.
        degrees: of freedom of the noise.
    """

    value: Array
    mass: Array
    noise: Array
    degrees: float

    @classmethod
    def of(cls, grid: TimeGrid, functional: Functional, statistics: Statistics) -> Series:
        """The series of a functional; rows of one user are clustered where statistics hold users.

        Clusters multiply the noise by the design effect on the value of the whole log.
        """
        assert statistics.time is not None, "callers check that rows have times"
        sums, fitted = statistics.time, fit(functional, statistics)
        mean, estimate = statistics.mean, finish(functional, statistics)
        influence = (sums.total - sums.count[:, None] * mean) @ fitted.gradient(mean)
        if isinstance(fitted, LinearFunctional):
            influence = influence * fitted.error_factor
        series = cls._of_influence(grid, sums, influence, estimate.value)
        if statistics.users is None:
            return series
        whole = float(series.mass**2 @ series.noise) / float(series.mass.sum()) ** 2
        effect = estimate.std_error**2 / whole if whole > 0.0 else 1.0
        return cls(
            series.value,
            series.mass,
            series.noise * max(1.0, effect),
            max(1.0, min(series.degrees, statistics.users.count - 1.0)),
        )

    @classmethod
    def _of_influence(
        cls, grid: TimeGrid, sums: TimeSums, influence: Array, value: float
    ) -> Series:
        bins, count = grid.bin, sums.count
        per_bin = np.bincount(bins, count)
        center = (np.bincount(bins, influence) / per_bin)[bins]
        square = np.bincount(bins, (influence - count * center) ** 2)
        # E sum_g (I_g - c_g mean)^2 = s^2 sum_g c_g (1 - c_g / c) for groups of independent rows.
        room = np.bincount(bins, count * (1.0 - count / per_bin[bins]))
        groups = np.bincount(bins) - 1.0
        period_of_bin = np.zeros(per_bin.size, dtype=np.int64)
        period_of_bin[bins] = grid.period_of_cell[grid.cell]
        squares, rooms, degrees = (
            np.bincount(period_of_bin, one) for one in (square, room, groups)
        )
        pooled = float(squares.sum() / rooms.sum()) if rooms.sum() > 0.0 else math.nan
        own = np.divide(squares, rooms, out=np.full_like(squares, pooled), where=rooms > 0.0)
        variance = (degrees * own + _PRIOR_DEGREES * pooled) / (degrees + _PRIOR_DEGREES)
        mass = np.bincount(grid.cell, count).astype(np.float64)
        found = value + np.bincount(grid.cell, influence) / mass
        return cls(
            found, mass, variance[grid.period_of_cell] / mass, max(1.0, float(degrees.sum()))
        )

    @property
    def varies(self) -> bool:
        """Whether rows of one time differ, so that anything can be tested."""
        return bool(np.isfinite(self.noise).all() and (self.noise > 0.0).all())

    def by_period(self, grid: TimeGrid) -> tuple[Array, Array]:
        """(P,) values by period and their standard errors by the noise of rows."""
        period, mass = grid.period_of_cell, self.mass
        total = np.bincount(period, mass)
        value = np.bincount(period, mass * self.value) / total
        return value, np.sqrt(np.bincount(period, mass**2 * self.noise)) / total


@dataclass(frozen=True, eq=False)
class Fit:
    """Weighted least squares of a series on some columns.

    coefficients: (p,). covariance: (p, p) at unit dispersion. dispersion: mean square of the
    residuals over the noise, 1 in expectation for independent rows. degrees: of freedom.
    """

    coefficients: Array
    covariance: Array
    residual: Array
    dispersion: float
    degrees: int

    @classmethod
    def of(cls, series: Series, columns: Array) -> Fit:
        """The fit, by the inverse noise of each cell."""
        root: Array = 1.0 / np.sqrt(series.noise)
        scaled, target = columns * root[:, None], series.value * root
        inverse: Array = np.asarray(np.linalg.pinv(scaled.T @ scaled), dtype=np.float64)
        coefficients: Array = np.asarray(inverse @ scaled.T @ target, dtype=np.float64)
        residual = np.asarray(target - scaled @ coefficients, dtype=np.float64)
        degrees = series.value.size - int(np.linalg.matrix_rank(scaled))
        return cls(
            coefficients,
            inverse,
            residual,
            float(residual @ residual) / max(1, degrees),
            degrees,
        )
