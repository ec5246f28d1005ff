"""Estimators with a reward model: q_i = q(x_i, a_i), m_i = sum_a pi_e(a|x_i) q(x_i, a)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from offtower.evaluation.estimators.base import Estimator, need_max_weight, reward_terms
from offtower.evaluation.estimators.weighted import sub_gaussian
from offtower.evaluation.rows import Array, EvaluationRows


@dataclass(frozen=True)
class DM(Estimator):
    """Direct method: V = mean m_i (Beygelzimer and Langford 2009). As good as its model."""

    label: ClassVar[str] = "dm"
    needs_reward_model: ClassVar[bool] = True
    uses_weight: ClassVar[bool] = False

    def terms(self, rows: EvaluationRows) -> Array:
        return reward_terms(rows, self.label)[1][:, None]

    def bounds(
        self, reward_range: tuple[float, float], max_weight: float | None
    ) -> tuple[float, float]:
        return reward_range


class DoublyRobustMean(Estimator):
    """mean f(w_i) (r_i - q_i) + m_i for a weight map f."""

    needs_reward_model: ClassVar[bool] = True

    def weight(self, importance_weight: Array) -> Array:
        """f(w)."""
        return importance_weight

    def peak(self, max_weight: float | None) -> float:
        """Largest value of f over [0, max_weight]."""
        return need_max_weight(self.label, max_weight)

    def terms(self, rows: EvaluationRows) -> Array:
        action_reward, expected_reward = reward_terms(rows, self.label)
        weight = self.weight(rows.importance_weight)
        return (weight * (rows.reward - action_reward) + expected_reward)[:, None]

    def bounds(
        self, reward_range: tuple[float, float], max_weight: float | None
    ) -> tuple[float, float]:
        """Predictions are taken to lie in the reward range too."""
        low, high = reward_range
        reach = self.peak(max_weight) * (high - low)
        return low - reach, high + reach


@dataclass(frozen=True)
class DR(DoublyRobustMean):
    """V = mean w (r - q) + m (Dudik, Langford, Li, ICML 2011). Unbiased."""

    label: ClassVar[str] = "dr"
    consistent: ClassVar[bool] = True


@dataclass(frozen=True)
class ClippedDR(DoublyRobustMean):
    """V = mean min(w, c) (r - q) + m (Wang, Agarwal, Dudik, ICML 2017; Su et al. 2020).

    max_weight: c, from 0 (DM) to infinity (DR).
    """

    max_weight: float
    label: ClassVar[str] = "clipped_dr"

    def __post_init__(self) -> None:
        self._check_parameter("max_weight", 0.0)

    def weight(self, importance_weight: Array) -> Array:
        return np.minimum(importance_weight, self.max_weight)

    def peak(self, max_weight: float | None) -> float:
        if np.isinf(self.max_weight):
            return need_max_weight(self.label, max_weight)
        return min(self.max_weight, np.inf if max_weight is None else max_weight)


@dataclass(frozen=True)
class SwitchDR(DoublyRobustMean):
    """V = mean w 1[w <= t] (r - q) + m (Wang, Agarwal, Dudik, ICML 2017).

    threshold: t, from 0 (DM) to infinity (DR).
    """

    threshold: float
    label: ClassVar[str] = "switch_dr"

    def __post_init__(self) -> None:
        self._check_parameter("threshold", 0.0)

    def weight(self, importance_weight: Array) -> Array:
        return np.where(importance_weight <= self.threshold, importance_weight, 0.0)

    def peak(self, max_weight: float | None) -> float:
        if np.isinf(self.threshold):
            return need_max_weight(self.label, max_weight)
        return min(self.threshold, np.inf if max_weight is None else max_weight)


@dataclass(frozen=True)
class DRos(DoublyRobustMean):
    """Optimistic shrinkage: V = mean (s w / (w^2 + s)) (r - q) + m (Su, Dimakopoulou,
    Krishnamurthy, Dudik, ICML 2020).

    shrinkage: s, from 0 (DM) to infinity (DR). The shrunken weight peaks at sqrt(s) / 2.
    """

    shrinkage: float
    label: ClassVar[str] = "dros"

    def __post_init__(self) -> None:
        self._check_parameter("shrinkage", 0.0)

    def weight(self, importance_weight: Array) -> Array:
        if self.shrinkage == 0.0:
            return np.zeros_like(importance_weight)
        return importance_weight / (1.0 + importance_weight * (importance_weight / self.shrinkage))

    def peak(self, max_weight: float | None) -> float:
        root = float(np.sqrt(self.shrinkage))
        if max_weight is None and np.isfinite(root):
            return root / 2.0
        top = need_max_weight(self.label, max_weight)
        return float(self.weight(np.array([min(root, top)]))[0])


@dataclass(frozen=True)
class SubGaussianDR(DoublyRobustMean):
    """V = mean w / (1 - lambda + lambda w) (r - q) + m (Metelli, Russo, Restelli, NeurIPS 2021).

    lambda_: in [0, 1]; 0 is DR.
    """

    lambda_: float
    label: ClassVar[str] = "sub_gaussian_dr"

    def __post_init__(self) -> None:
        self._check_parameter("lambda_", 0.0, 1.0)

    def weight(self, importance_weight: Array) -> Array:
        return sub_gaussian(importance_weight, self.lambda_)

    def peak(self, max_weight: float | None) -> float:
        if self.lambda_ > 0.0 and max_weight is None:
            return 1.0 / self.lambda_
        return float(self.weight(np.array([need_max_weight(self.label, max_weight)]))[0])


@dataclass(frozen=True)
class SNDR(Estimator):
    """Self-normalised DR: V = sum w (r - q) / sum w + mean m (Thomas and Brunskill, ICML 2016)."""

    label: ClassVar[str] = "sndr"
    num_terms: ClassVar[int] = 3
    needs_reward_model: ClassVar[bool] = True
    consistent: ClassVar[bool] = True

    def terms(self, rows: EvaluationRows) -> Array:
        action_reward, expected_reward = reward_terms(rows, self.label)
        weight = rows.importance_weight
        return np.stack([weight, weight * (rows.reward - action_reward), expected_reward], axis=1)

    def combine(self, mean: Array) -> Array:
        return mean[..., 1] / mean[..., 0] + mean[..., 2]

    def gradient(self, mean: Array) -> Array:
        return np.array([-mean[1] / mean[0] ** 2, 1.0 / mean[0], 1.0])
