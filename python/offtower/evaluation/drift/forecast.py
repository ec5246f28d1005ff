"""The value of a period after the log, with the uncertainty of what happens until then.

The series of cells y is a linear trend with seasons, a motion beside it, and noise (a structural
time series; Harvey 1989):

    y = X b + w + e,    Var(e_i) = phi noise_i,

w being nothing, a random walk or an integrated one. With s^2 the variance of the mean of all cells,
times from 0 to 1 over the log, m = min(t_i, t_j) and M = max(t_i, t_j), Cov(w_i, w_j) is

    rho^2 s^2 m                           of a random walk: the level moves;
    3 rho^2 s^2 (m^2 M / 2 - m^3 / 6)     of an integrated one, the prior of a cubic smoothing
                                          spline (Wahba 1978): the slope moves.

Given w and phi, the best linear unbiased prediction weighs recent cells more; under a random walk
exponentially in their age, by a half-life that falls with rho. Each component of a grid counts by
how well it predicts cells from earlier ones: the restricted likelihood is the product of these
forward predictive densities (Schweppe 1965), times a prior weight. The interval is that of the
mixture, so that it holds the uncertainty about how the value moves.

Stratifying by seasons follows "Off-Policy Evaluation and Learning for the Future under
Non-Stationarity" (Shimizu et al., KDD 2025), whose estimator weighs the rows that share the
future's time features; a trend and a walk take the place of their reward model over time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtr, ndtri

from offtower.errors import DataError
from offtower.evaluation.drift.grid import LEAST_CELLS, TimeGrid
from offtower.evaluation.drift.series import Series
from offtower.evaluation.rows import Array

RANDOM_WALKS = (4.0, 8.0, 16.0, 32.0, 64.0)
"""rho: standard deviation at the log's end over that of the mean of all cells."""
INTEGRATED_WALKS = (32.0, 64.0, 128.0)
DISPERSIONS = (1.0, 2.0, 5.0, 15.0)
"""phi: variance of a cell over that of independent rows."""
NO_WALK, INTEGRATED, NO_DISPERSION = 0.3, 0.4, 0.85
"""Prior weights of w = 0, of integrated walks and of phi = 1. Random walks share the rest by rho,
integrated ones theirs by sqrt(rho), the other phi theirs equally. With some dozens of cells the
likelihood of a walk often is largest near none (Shephard 1993), and with more weight there
forecasts cover too little. Chosen by coverage over some kinds of drift, and measured on others
(docs/results)."""
MOST_AHEAD = 0.5
"""A forecast reaches at most so far, as a share of the log's length."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """A mixture of normal distributions.

    Attributes:
        weight, mean, std_dev: (c,) of its components.
        half_life: age, as a share of the log's length, at which a cell counts half, in the
            component of the largest weight without an integrated walk; None where all cells count
            alike in it.
    """

    weight: Array
    mean: Array
    std_dev: Array
    half_life: float | None

    @property
    def value(self) -> float:
        """Mean of the mixture."""
        return float(self.weight @ self.mean)

    @property
    def std_error(self) -> float:
        """Standard deviation of the mixture."""
        square = self.weight @ (self.std_dev**2 + self.mean**2) - self.value**2
        return math.sqrt(max(0.0, float(square)))

    def quantile(self, probability: float) -> float:
        """Quantile of the mixture."""
        z = float(ndtri(probability))
        ends = self.mean + z * self.std_dev
        low, high = float(ends.min()), float(ends.max())
        if not high > low:
            return low

        def excess(x: float) -> float:
            return float(self.weight @ ndtr((x - self.mean) / self.std_dev)) - probability

        return float(brentq(excess, low, high, xtol=1e-12 * max(1.0, abs(low), abs(high))))

    def distances(self, confidence: float) -> tuple[float, float]:
        """Of the interval's ends from the value, both at least 0."""
        tail = 0.5 * (1.0 - confidence)
        return (
            max(0.0, self.value - self.quantile(tail)),
            max(0.0, self.quantile(1.0 - tail) - self.value),
        )


def check_forecast(grid: TimeGrid) -> None:
    """Raise DataError where a log cannot carry a forecast, and say why."""
    if len(grid.periods) < 3 or grid.cells < LEAST_CELLS:
        raise DataError(
            f"no estimate for {grid.future_name}: the log has {len(grid.periods)} periods in "
            f"{grid.cells} cells of time, and a trend needs at least 3 in {LEAST_CELLS}. Evaluate "
            "a longer log, or set a shorter evaluation.time.period"
        )
    if grid.future_length > MOST_AHEAD + 1e-9:
        raise DataError(
            f"no estimate for {grid.future_name}: it reaches {grid.future_length:.2g} of the "
            f"log's length beyond its end, at most {MOST_AHEAD:g} is allowed. Evaluate a longer "
            "log, or set a smaller evaluation.time.horizon"
        )


@dataclass(frozen=True, eq=False)
class _Motion:
    """Kinds of w, each (c, ...), in units of s^2.

    Attributes:
        covariance: (c, m, m) of the cells. linked: (c, m) of cells and the future period.
        future: (c,) variance in the future period.
        log_prior: (c,). walk: (c,) rho^2 of random walks, NaN of integrated ones.
    """

    covariance: Array
    linked: Array
    future: Array
    log_prior: Array
    walk: Array

    @classmethod
    def of(cls, grid: TimeGrid) -> _Motion:
        time, end = grid.time, 1.0 + 0.5 * grid.future_length
        first, last = np.minimum.outer(time, time), np.maximum.outer(time, time)
        level = np.square([0.0, *RANDOM_WALKS])
        slope = 3.0 * np.square(INTEGRATED_WALKS)
        # A walk goes on until the middle of the future period, and around it.
        return cls(
            np.concatenate(
                [
                    np.multiply.outer(level, first),
                    np.multiply.outer(slope, first**2 * last / 2.0 - first**3 / 6.0),
                ]
            ),
            np.concatenate(
                [
                    np.multiply.outer(level, time),
                    np.multiply.outer(slope, time**2 * end / 2.0 - time**3 / 6.0),
                ]
            ),
            np.concatenate([level * (1.0 + grid.future_length / 3.0), slope * end**3 / 3.0]),
            np.log(
                np.concatenate(
                    [
                        [NO_WALK],
                        _shares(1.0 - NO_WALK - INTEGRATED, RANDOM_WALKS, 1.0),
                        _shares(INTEGRATED, INTEGRATED_WALKS, 0.5),
                    ]
                )
            ),
            np.concatenate([level, np.full(slope.size, np.nan)]),
        )


def predict(grid: TimeGrid, series: Series) -> Prediction:
    """The distribution of the value in the future period."""
    noise, value, motion = series.noise, series.value, _Motion.of(grid)
    kind, number = (
        one.ravel() for one in np.meshgrid(np.arange(motion.walk.size), np.arange(len(DISPERSIONS)))
    )
    phi, unit = np.array(DISPERSIONS)[number], 1.0 / float((1.0 / noise).sum())
    covariance = unit * motion.covariance[kind] + phi[:, None, None] * np.diag(noise)
    factor = np.linalg.cholesky(covariance)
    # Generalized least squares, by whitening: columns, values, and covariances with the future.
    known = np.concatenate([grid.design, value[:, None]], axis=1)
    every = np.broadcast_to(known, (kind.size, *known.shape))
    data = np.concatenate([every, unit * motion.linked[kind][..., None]], axis=2)
    white = np.linalg.solve(factor, data)
    columns, target, linked = white[..., :-2], white[..., -2], white[..., -1]
    information = columns.swapaxes(1, 2) @ columns
    inverse = np.linalg.pinv(information)
    coefficients = np.einsum("cpq,cmq,cm->cp", inverse, columns, target)
    residual = target - np.einsum("cmp,cp->cm", columns, coefficients)
    ahead = grid.future_design
    rest = ahead - np.einsum("cmp,cm->cp", columns, linked)
    mean = coefficients @ ahead + (linked * residual).sum(axis=1)
    variance = unit * motion.future[kind]
    variance += (phi - 1.0) * float(noise.mean()) / grid.future_cells
    variance += np.einsum("cp,cpq,cq->c", rest, inverse, rest) - (linked**2).sum(axis=1)
    diagonal = np.diagonal(factor, axis1=1, axis2=2)
    log_likelihood = -np.log(diagonal).sum(axis=1) - 0.5 * (residual**2).sum(axis=1)
    log_likelihood -= 0.5 * np.linalg.slogdet(information)[1]
    others = _shares(1.0 - NO_DISPERSION, np.ones(len(DISPERSIONS) - 1), 1.0)
    logs = log_likelihood + motion.log_prior[kind] + np.log([NO_DISPERSION, *others])[number]
    weight = np.exp(logs - logsumexp(logs))
    best = int(np.argmax(np.where(np.isfinite(motion.walk[kind]), weight, -1.0)))
    step = unit * float(motion.walk[kind[best]]) / grid.cells
    half_life = _half_life(step, phi[best] * float(noise.mean()))
    return Prediction(
        weight,
        mean,
        np.sqrt(variance),
        None if half_life is None else half_life / grid.cells,
    )


def _shares(total: float, size: Sequence[float] | Array, power: float) -> Array:
    """Shares of a total in proportion to size ** power."""
    weight = np.asarray(size, dtype=np.float64) ** power
    return np.asarray(total * weight / weight.sum())


def _half_life(step: float, noise: float) -> float | None:
    """Cells after which a cell counts half in the steady state of a random walk with noise."""
    if step == 0.0:
        return None
    ratio = step / noise
    gain = 0.5 * (math.sqrt(ratio * ratio + 4.0 * ratio) - ratio)
    return math.log(0.5) / math.log1p(-gain)
