"""Intervals where rows that are close in time are correlated.

The variance of a value is that of the lowest frequencies of its cells' influences: the mean square
of their first nu cosine transforms, with Student's t of nu degrees (Lazarus, Lewis, Stock and
Watson 2018, "HAR Inference"). It covers in more worlds of correlated cells than cells as clusters,
or than Newey and West's (1987): docs/results has the figures.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri, stdtrit

from offtower.evaluation.drift.grid import TimeGrid
from offtower.evaluation.drift.hypotheses import holm, serial_correlation
from offtower.evaluation.drift.series import Fit, Series

FOUND = 0.05
"""Probability of finding correlation on a log of independent rows."""


def found_correlation(grid: TimeGrid, series: list[Series]) -> float:
    """Adjusted p of "rows are independent given their time", the least over the series."""
    tests = [serial_correlation(grid, one) for one in series]
    p = [one.p for one in tests if one is not None]
    return min(holm(p)) if p else 1.0


def widening(grid: TimeGrid, series: Series, confidence: float) -> float:
    """Factor of an interval's width for rows that are correlated in time, at least 1."""
    if not series.varies or grid.cells < 4:
        return 1.0
    level = np.concatenate([np.ones((grid.cells, 1)), grid.season], axis=1)
    fit = Fit.of(series, level)
    influence = fit.residual * np.sqrt(series.noise) * series.mass
    m = influence.size
    nu = min(max(3, int(m ** (2.0 / 3.0) / 3.0)), m - 1)
    angle = np.pi * np.outer((np.arange(m) + 0.5) / m, np.arange(1, nu + 1))
    projected = influence @ (np.sqrt(2.0 / m) * np.cos(angle))
    by_time = float(np.sqrt(m * np.mean(projected**2)))
    by_row = float(np.sqrt(series.mass**2 @ series.noise))
    upper = 0.5 + 0.5 * confidence
    return max(1.0, float(stdtrit(nu, upper) / ndtri(upper)) * by_time / by_row)
