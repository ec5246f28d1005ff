"""Tests for drift of a value, and for correlation of rows that are close in time.

All use cells of time as units. Their noise is estimated from the cells themselves, so that the
tests hold where rows of one cell are correlated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc, stdtr

from offtower.evaluation.drift.grid import TimeGrid
from offtower.evaluation.drift.series import Fit, Series


@dataclass(frozen=True)
class SerialCorrelation:
    """Whether cells differ by more than independent rows explain, beside a trend and seasons.

    Attributes:
        p: of the test; by F, the dispersion of the residuals of a linear trend.
        dispersion: variance of a cell over that of independent rows.
    """

    p: float
    dispersion: float


def drift_p(grid: TimeGrid, series: Series) -> float:
    """p of "the value is the same in all periods", beside seasons.

    Twice the smaller of two p (Bonferroni): Student's t of a linear trend, and F of the periods
    against their cells. 1 where rows of one time do not differ.
    """
    if not series.varies:
        return 1.0
    trend = Fit.of(series, grid.design)
    found = [1.0]
    if trend.degrees > 0 and trend.dispersion > 0.0:
        error = np.sqrt(trend.covariance[1, 1] * trend.dispersion)
        found.append(2.0 * float(stdtr(trend.degrees, -abs(trend.coefficients[1]) / error)))
    level = np.concatenate([np.ones((grid.cells, 1)), grid.season], axis=1)
    member = grid.period_of_cell[:, None] == np.arange(1, len(grid.periods))
    null = Fit.of(series, level)
    full = Fit.of(series, np.concatenate([level, member], axis=1))
    between = null.degrees - full.degrees
    if between > 0 and full.degrees > 1 and full.dispersion > 0.0:
        square = float(null.residual @ null.residual - full.residual @ full.residual)
        ratio = max(0.0, square / between / full.dispersion)
        found.append(float(fdtrc(between, full.degrees, ratio)))
    return min(1.0, (len(found) - 1) * min(found)) if len(found) > 1 else 1.0


def serial_correlation(grid: TimeGrid, series: Series) -> SerialCorrelation | None:
    """The test, or None without enough cells."""
    if not series.varies:
        return None
    fit = Fit.of(series, grid.design)
    if fit.degrees < 2:
        return None
    return SerialCorrelation(
        float(fdtrc(fit.degrees, series.degrees, fit.dispersion)), fit.dispersion
    )


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p of several tests (Holm 1979): all below alpha are wrong with probability alpha."""
    order = np.argsort(p)
    factor = len(p) - np.arange(len(p))
    adjusted = np.minimum(1.0, np.maximum.accumulate(factor * np.asarray(p, float)[order]))
    out = np.empty(len(p))
    out[order] = adjusted
    return [float(one) for one in out]
