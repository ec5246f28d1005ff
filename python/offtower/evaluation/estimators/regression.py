"""Regression estimators: control variates of known mean, with coefficients from the sums.

Under true propensities E[w] = 1 and, with a reward model, E[w q - m] = 0. The regression estimator
(Cassel, Sarndal and Wretman 1976; for off-policy evaluation Kallus and Uehara, NeurIPS 2019) is

    V = mean w r - b_1 (mean w - 1) - b_2 mean(w q - m),

with the coefficients of least variance b = Cov(z)^-1 Cov(z, w r), z the controls. To first order
b = (0, 0) gives IPS, (V, 0) SNIPS, (0, 1) DR and (mean w (r - q), 1) SNDR. No weighted average of
these four, such as a blend by the covariance of their influences, has a smaller variance in a large
log. A paired difference has coefficients of its own, which minimize its variance. In few units
(`intervals.regression.least_units`) they are those of IPS and DR.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from offtower.evaluation.estimators.base import Estimator, expected_terms, reward_terms
from offtower.evaluation.intervals.regression import Control
from offtower.evaluation.rows import Array, EvaluationRows


class RegIPS(Estimator):
    """IPS with the control w, of mean 1."""

    label: ClassVar[str] = "reg_ips"
    num_terms: ClassVar[int] = 2
    consistent: ClassVar[bool] = True
    controls: ClassVar[tuple[Control, ...]] = (Control(1, 1.0),)

    def terms(self, rows: EvaluationRows) -> Array:
        return np.stack([rows.importance_weight * rows.reward, rows.mean_weight], axis=1)

    def gradient(self, mean: Array) -> Array:
        return np.array([1.0, 0.0])


class RegDR(Estimator):
    """IPS with the controls w, of mean 1, and w q - m, of mean 0."""

    label: ClassVar[str] = "reg_dr"
    num_terms: ClassVar[int] = 3
    needs_reward_model: ClassVar[bool] = True
    consistent: ClassVar[bool] = True
    controls: ClassVar[tuple[Control, ...]] = (Control(1, 1.0), Control(2, 0.0, default=1.0))

    def terms(self, rows: EvaluationRows) -> Array:
        action_reward, expected_reward = reward_terms(rows, self.label)
        weight = rows.importance_weight
        expected = expected_terms(rows, expected_reward, lambda earlier: earlier)
        balance = weight * action_reward - expected
        return np.stack([weight * rows.reward, rows.mean_weight, balance], axis=1)

    def gradient(self, mean: Array) -> Array:
        return np.array([1.0, 0.0, 0.0])
