"""The value of a period after the log, with the uncertainty of what happens until then.

The series of cells y is a linear trend with seasons, a random walk, and noise (a structural time
series; Harvey 1989):

    y = X b + w + e,    Cov(w_i, w_j) = rho^2 s^2 min(t_i, t_j),    Var(e_i) = phi noise_i,

with s^2 the variance of the mean of all cells and times from 0 to 1 over the log. Given rho and
phi, the best linear unbiased prediction weighs recent cells more: exponentially in their age, by a
half-life that falls with rho. Each (rho, phi) of a grid counts by how well it predicts cells from
earlier ones: the restricted likelihood is the product of these forward predictive densities
(Schweppe 1965), times a prior weight. The interval is that of the mixture, so that it
holds the uncertainty about the half-life.

Stratifying by seasons follows "Off-Policy Evaluation and Learning for the Future under
Non-Stationarity" (Shimizu et al., KDD 2025), whose estimator weighs the rows that share the
future's time features; a trend and a random walk take the place of their reward model over time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtr, ndtri

from offtower.errors import DataError
from offtower.evaluation.drift.grid import LEAST_CELLS, TimeGrid
from offtower.evaluation.drift.series import Series
from offtower.evaluation.rows import Array

RANDOM_WALKS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""rho: standard deviation of the random walk over the log, over that of the mean of all cells."""
DISPERSIONS = (1.0, 2.0, 5.0, 15.0)
"""phi: variance of a cell over that of independent rows."""
NO_WALK, NO_DISPERSION = 0.2, 0.85
"""Prior weights of rho = 0 and phi = 1. The rest is shared, by the values of phi equally, by those
of rho as sqrt(rho): with some dozens of cells the likelihood of a random walk often is largest near
rho = 0 (Shephard 1993), and with more weight there forecasts cover too little. Chosen by coverage
over some kinds of drift, and measured on others (docs/results)."""
MOST_AHEAD = 0.5
"""A forecast reaches at most so far, as a share of the log's length."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """A mixture of normal distributions.

    Attributes:
        weight, mean, std_dev: (c,) of its components.
        half_life: age, as a share of the log's length, at which a cell counts half, in the
            component of the largest weight; None where all cells count alike.
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


def predict(grid: TimeGrid, series: Series) -> Prediction:
    """The distribution of the value in the future period."""
    noise, value = series.noise, series.value
    rho, phi = (one.ravel() for one in np.meshgrid(RANDOM_WALKS, DISPERSIONS, indexing="ij"))
    step = rho**2 / float((1.0 / noise).sum())
    walk = np.minimum.outer(grid.time, grid.time)
    covariance = step[:, None, None] * walk + phi[:, None, None] * np.diag(noise)
    factor = np.linalg.cholesky(covariance)
    # Generalized least squares, by whitening: columns, values, and covariances with the future.
    data = np.concatenate([grid.design, value[:, None], grid.time[:, None]], axis=1)
    white = np.linalg.solve(factor, np.broadcast_to(data, (rho.size, *data.shape)))
    columns, target = white[..., :-2], white[..., -2]
    linked = step[:, None] * white[..., -1]
    information = columns.swapaxes(1, 2) @ columns
    inverse = np.linalg.pinv(information)
    coefficients = np.einsum("cpq,cmq,cm->cp", inverse, columns, target)
    residual = target - np.einsum("cmp,cp->cm", columns, coefficients)
    ahead = grid.future_design
    rest = ahead - np.einsum("cmp,cm->cp", columns, linked)
    mean = coefficients @ ahead + (linked * residual).sum(axis=1)
    # The walk goes on until the middle of the future period, and around it.
    variance = step * (1.0 + grid.future_length / 3.0)
    variance += (phi - 1.0) * float(noise.mean()) / grid.future_cells
    variance += np.einsum("cp,cpq,cq->c", rest, inverse, rest) - (linked**2).sum(axis=1)
    diagonal = np.diagonal(factor, axis1=1, axis2=2)
    log_likelihood = -np.log(diagonal).sum(axis=1) - 0.5 * (residual**2).sum(axis=1)
    log_likelihood -= 0.5 * np.linalg.slogdet(information)[1]
    logs = log_likelihood + _log_prior(rho, NO_WALK, 0.5) + _log_prior(phi, NO_DISPERSION, 0.0)
    weight = np.exp(logs - logsumexp(logs))
    best = int(np.argmax(weight))
    half_life = _half_life(step[best] / grid.cells, phi[best] * float(noise.mean()))
    return Prediction(
        weight,
        mean,
        np.sqrt(variance),
        None if half_life is None else half_life / grid.cells,
    )


def _log_prior(value: Array, first: float, power: float) -> Array:
    """Log prior weights of a grid: `first` for its least value, the rest as value ** power."""
    others = np.unique(value)[1:]
    rest = (1.0 - first) * value**power / (others**power).sum()
    return np.log(np.where(value == value.min(), first, np.maximum(rest, 1e-300)))


def _half_life(step: float, noise: float) -> float | None:
    """Cells after which a cell counts half in the steady state of a random walk with noise."""
    if step == 0.0:
        return None
    ratio = step / noise
    gain = 0.5 * (math.sqrt(ratio * ratio + 4.0 * ratio) - ratio)
    return math.log(0.5) / math.log1p(-gain)
