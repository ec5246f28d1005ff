"""Control variates: subtract terms of known mean, with the coefficients of least variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offtower.evaluation.intervals.gamma import unit_sums
from offtower.evaluation.intervals.linear import LinearFunctional
from offtower.evaluation.intervals.statistics import Functional, Statistics
from offtower.evaluation.rows import Array

_LEAST_REMAINDER = 0.01
"""1 - leverage, at least: a unit that alone determines a coefficient has leverage 1."""
_LEAST_EIGENVALUE = 1e-10
"""Of the controls' correlation matrix: below it they are taken to be collinear."""
_LEAST_DEGREES = 10
"""Of freedom that a fit leaves, at least: with fewer, values of many times the range of rewards
with an error near 0 occur, and the coefficients are not fitted."""


@dataclass(frozen=True)
class Control:
    """A term, by its column, whose mean is known; `default` is its coefficient in few units."""

    column: int
    mean: float
    default: float = 0.0


def least_units(controls: Sequence[Control]) -> int:
    """Independent units that the coefficients of controls need to be fitted; 0 without any."""
    return len(controls) + 1 + _LEAST_DEGREES if controls else 0


def adjusted(
    functional: Functional, controls: Sequence[Control], statistics: Statistics
) -> LinearFunctional:
    """functional - sum_j b_j (mean z_j - known_j), b = Cov(z)^-1 Cov(z, functional).

    In fewer than `least_units` units b is the controls' default.

    The functional is linearized at the means. Covariances are those of the independent units: of
    users where the statistics hold them. The standard error is that of residuals divided by
    1 - leverage (HC3, the jackknife: MacKinnon and White 1985), by user or group of rows; of
    statistics without either, its mean over many rows.
    """
    mean = statistics.mean
    gradient = np.asarray(functional.gradient(mean), dtype=np.float64)
    columns = [control.column for control in controls]
    known = np.array([control.mean for control in controls])
    units, scatter = _units(statistics), unit_scatter(statistics)
    coefficient, rank = np.array([control.default for control in controls]), 0
    if (statistics.n if statistics.users is None else statistics.users.count) >= least_units(
        controls
    ):
        coefficient, rank = _coefficients(
            scatter[np.ix_(columns, columns)], scatter[columns] @ gradient
        )
    slope = gradient.copy()
    np.subtract.at(slope, columns, coefficient)
    constant = float(functional.combine(mean)) - float(gradient @ mean)
    return LinearFunctional(
        functional.name,
        slope,
        constant + float(coefficient @ known),
        _error_factor(statistics, units, slope, columns, rank),
    )


def unit_scatter(statistics: Statistics) -> Array:
    """(k, k) sum over users, or over rows where the statistics hold no users, of the products of
    their centered terms."""
    if statistics.users is None:
        return statistics.scatter
    units = _units(statistics)
    return statistics.scatter if units is None else units.T @ units


def _units(statistics: Statistics) -> Array | None:
    """(u, k) centered sums of the independent units; None where the statistics hold none."""
    if statistics.users is None and statistics.groups is None:
        return None
    if statistics.users is not None and statistics.users.count < 2:
        return None
    count, total = unit_sums(statistics)
    return np.asarray(total - count[:, None] * statistics.mean)


def _coefficients(scatter: Array, target: Array) -> tuple[Array, int]:
    """Least squares coefficients of standardized controls, and their rank; 0 for collinear ones."""
    scale = np.sqrt(np.diagonal(scatter))
    used = np.flatnonzero((scale > 0.0) & np.isfinite(scale))
    coefficient = np.zeros(target.size)
    if used.size == 0 or not np.isfinite(target).all():
        return coefficient, 0
    scale = scale[used]
    correlation = scatter[np.ix_(used, used)] / np.outer(scale, scale)
    inverse = np.linalg.pinv(correlation, rcond=_LEAST_EIGENVALUE, hermitian=True)
    coefficient[used] = (inverse @ (target[used] / scale)) / scale
    return coefficient, int(np.linalg.matrix_rank(correlation, tol=_LEAST_EIGENVALUE))


def _error_factor(
    statistics: Statistics, units: Array | None, slope: Array, columns: list[int], rank: int
) -> float:
    if rank == 0:
        return 1.0
    if units is None:
        return float(np.sqrt((statistics.n - 1.0) / max(1.0, statistics.n - 1.0 - rank)))
    residual, controls = units @ slope, units[:, columns]
    scale = np.sqrt((controls**2).sum(axis=0))
    basis, size, _ = np.linalg.svd(
        controls[:, scale > 0.0] / scale[scale > 0.0], full_matrices=False
    )
    leverage = (basis[:, size**2 > _LEAST_EIGENVALUE] ** 2).sum(axis=1)
    square = float(residual @ residual)
    if not square > 0.0:
        return 1.0
    residual = residual / np.maximum(1.0 - leverage, _LEAST_REMAINDER)
    return float(np.sqrt(float(residual @ residual) / square))
