"""Estimators that divide by the sum of the weights; standard errors by the delta method."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from offtower.evaluation.estimators.base import Estimator, expected_terms, reward_terms
from offtower.evaluation.rows import Array, EvaluationRows


class SNIPS(Estimator):
    """V = sum w r / sum w (Swaminathan and Joachims, NeurIPS 2015).

    Of slates the sum of weights counts a round once: it sums their mean over the positions.
    """

    label: ClassVar[str] = "snips"
    scale_free: ClassVar[bool] = True
    num_terms: ClassVar[int] = 2
    consistent: ClassVar[bool] = True

    def terms(self, rows: EvaluationRows) -> Array:
        weight = rows.importance_weight
        return np.stack([rows.mean_weight, weight * rows.reward], axis=1)

    def combine(self, mean: Array) -> Array:
        return mean[..., 1] / _finite(mean[..., 0])

    def gradient(self, mean: Array) -> Array:
        return np.array([-mean[1] / mean[0] ** 2, 1.0 / mean[0]])


class SNDR(Estimator):
    """V = sum w (r - q) / sum w + mean m (Thomas and Brunskill, ICML 2016)."""

    label: ClassVar[str] = "sndr"
    num_terms: ClassVar[int] = 3
    needs_reward_model: ClassVar[bool] = True
    consistent: ClassVar[bool] = True

    def terms(self, rows: EvaluationRows) -> Array:
        action_reward, expected_reward = reward_terms(rows, self.label)
        weight = rows.importance_weight
        residual = weight * (rows.reward - action_reward)
        expected = expected_terms(rows, expected_reward, _identity)
        return np.stack([rows.mean_weight, residual, expected], axis=1)

    def combine(self, mean: Array) -> Array:
        return mean[..., 1] / _finite(mean[..., 0]) + mean[..., 2]

    def gradient(self, mean: Array) -> Array:
        return np.array([-mean[1] / mean[0] ** 2, 1.0 / mean[0], 1.0])


def _identity(weight: Array) -> Array:
    return weight


def _finite(mean_weight: Array) -> Array:
    """The mean weight; NaN where the sum of the weights overflowed, which must not give 0."""
    return np.where(np.isinf(mean_weight), np.nan, mean_weight)
