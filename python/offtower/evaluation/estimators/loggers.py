"""Estimators of logs of several behavior policies (loggers): a weighted average of their estimates.

V = sum_l lambda_l V_l, V_l the mean over the rows of logger l, with weights in proportion to
n_l / sigma_l^2, those of least variance without further knowledge of the loggers (weighted IPS:
Agarwal, Basu, Schnabel, Joachims, KDD 2017; for DR compare Kallus, Saito, Uehara, ICML 2021). The
plain mean over all rows has the weights n_l / n, so that a logger whose propensities are far from
the evaluated policy sets its variance.

The weights of one half of the units (users, else rounds, else rows) are estimated on the other
half, so that they do not depend on the values that they weight: with rare rewards a mean and its
variance are correlated, and weights from the same rows would prefer low values.

All loggers must have served the same population of contexts, as in a randomized experiment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from offtower.data.columns import splitmix64
from offtower.errors import OfftowerError
from offtower.evaluation.estimators.base import Estimator
from offtower.evaluation.estimators.means import DR, IPS
from offtower.evaluation.intervals.linear import LinearFunctional
from offtower.evaluation.intervals.regression import unit_scatter
from offtower.evaluation.intervals.statistics import Functional, Statistics
from offtower.evaluation.rows import Array, EvaluationRows, IntArray

MAX_LOGGERS = 16
"""An evaluation keeps four terms of each."""
_POOLED_ROWS = 10.0
"""Rows of the mean variance over loggers that each logger's variance is averaged with: a logger
without a rewarded row has a variance of 0 in the log."""
_TINY = 1e-300


@dataclass(frozen=True)
class LoggerWeighted(Estimator):
    """A mean per logger, and their average of least variance.

    loggers: number of behavior policies; rows name theirs by `EvaluationRows.logger`.
    """

    loggers: int = 1
    consistent: ClassVar[bool] = True
    base: ClassVar[Estimator]
    """What is averaged: a mean of one term."""

    def __post_init__(self) -> None:
        if not 1 <= self.loggers <= MAX_LOGGERS:
            raise OfftowerError(
                f"{self.label} takes 1 to {MAX_LOGGERS} behavior policies, and the log has "
                f"{self.loggers}; join those that are alike in the column behavior_policy, or use "
                "ips, snips or dr"
            )
        object.__setattr__(self, "num_terms", 4 * self.loggers)

    @property
    def name(self) -> str:
        return self.label

    @property
    def num_loggers(self) -> int:
        return self.loggers

    @property
    def takes_coefficients(self) -> bool:
        return True

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        return ()

    def terms(self, rows: EvaluationRows) -> Array:
        """(n, 4 L): for each half and logger an indicator of its rows, and their terms."""
        if rows.logger is None:
            raise OfftowerError(
                f"{self.label} needs to know which behavior policy logged each row: name the "
                "column under 'behavior_policy' in the log's schema, or give the rows 'logger'"
            )
        if rows.n and not 0 <= rows.logger.min() <= rows.logger.max() < self.loggers:
            raise OfftowerError(
                f"{self.label}: logger reaches from {rows.logger.min()} to {rows.logger.max()}, "
                f"but must lie in [0, {self.loggers})"
            )
        out = np.zeros((rows.n, 2 * self.loggers, 2))
        cell = _half(rows) * self.loggers + rows.logger
        index = np.arange(rows.n)
        out[index, cell, 0] = rows.share_of_unit
        out[index, cell, 1] = self.base.terms(rows)[:, 0]
        return out.reshape(rows.n, self.num_terms)

    def combine(self, mean: Array) -> Array:
        """The plain mean over all rows."""
        return np.asarray(mean[..., 1::2].sum(axis=-1))

    def gradient(self, mean: Array) -> Array:
        return np.tile([0.0, 1.0], 2 * self.loggers)

    def fitted(self, statistics: Statistics) -> Functional:
        """The average with the weights that the other half of the units gives."""
        share, value = _means(statistics.mean)
        used, half = share > 0.0, share.reshape(2, -1)
        variance = self._variance(statistics, share, value)
        precision = np.divide(half, variance, out=np.zeros_like(half), where=variance > 0.0)
        crossed = precision[::-1] * (half > 0.0)
        # Without variance, or without a logger in both halves, the plain mean.
        crossed = np.where(crossed.sum(axis=1, keepdims=True) > 0.0, crossed, half)
        crossed = crossed / np.maximum(crossed.sum(axis=1, keepdims=True), _TINY)
        weight = half.sum(axis=1, keepdims=True) * crossed
        slope = np.zeros((share.size, 2))
        slope[used, 1] = weight.ravel()[used] / share[used]
        slope[used, 0] = -slope[used, 1] * value[used]
        return LinearFunctional(self.name, slope.ravel(), float(weight.ravel() @ value))

    def _variance(self, statistics: Statistics, share: Array, value: Array) -> Array:
        """(2, L) variance of a row's term, averaged with the mean over the half's loggers."""
        scatter = unit_scatter(statistics)
        if not np.isfinite(scatter).all():
            return np.ones((2, self.loggers))
        first = np.arange(share.size) * 2
        count = statistics.count * share
        square = (
            scatter[first + 1, first + 1]
            - 2.0 * value * scatter[first, first + 1]
            + value**2 * scatter[first, first]
        )
        square, count = np.maximum(square, 0.0).reshape(2, -1), count.reshape(2, -1)
        total = count.sum(axis=1, keepdims=True)
        pooled = square.sum(axis=1, keepdims=True) / np.maximum(total, _TINY)
        return np.asarray((square + _POOLED_ROWS * pooled) / (count + _POOLED_ROWS))


class LoggerWeightedIPS(LoggerWeighted):
    """IPS per logger, averaged with the weights of least variance."""

    label: ClassVar[str] = "logger_weighted_ips"
    base: ClassVar[Estimator] = IPS()


class LoggerWeightedDR(LoggerWeighted):
    """DR per logger, averaged with the weights of least variance."""

    label: ClassVar[str] = "logger_weighted_dr"
    needs_reward_model: ClassVar[bool] = True
    base: ClassVar[Estimator] = DR()


def balanced_weight(target: Array, loggers: Array, share: Array) -> Array:
    """(n,) balanced weights pi_e(a|x) / sum_l s_l pi_l(a|x) (Agarwal et al. 2017).

    Never of larger variance than each row's own weights, for IPS.

    Args:
        target: (n,) the evaluated policy's probability of the logged item.
        loggers: (n, L) every behavior policy's probability of the same item.
        share: (L,) share of the rows that each of them logged.

    Raises:
        OfftowerError: an item that no behavior policy shows.
    """
    mixture = np.asarray(loggers, dtype=np.float64) @ np.asarray(share, dtype=np.float64)
    if (mixture <= 0.0).any():
        raise OfftowerError(
            f"row {int(np.argmax(mixture <= 0.0))} logged an item that every behavior policy gives "
            "probability 0; check the order of items and policies"
        )
    return np.asarray(target / mixture)


def _means(mean: Array) -> tuple[Array, Array]:
    """(2 L,) shares of the rows, and mean terms; 0 for a logger without rows in a half."""
    share, total = mean[0::2], mean[1::2]
    return share, np.divide(total, share, out=np.zeros_like(total), where=share > 0.0)


def _half(rows: EvaluationRows) -> IntArray:
    """(n,) 0 or 1, alike for the rows of a user or a round: a bit of the key's hash."""
    key = rows.user
    if key is None:
        key = rows.round if rows.round is not None else rows.row
    if key is None:
        key = np.arange(rows.n)
    return np.asarray((splitmix64(key.astype(np.uint64)) >> np.uint64(63)).astype(np.int64))
