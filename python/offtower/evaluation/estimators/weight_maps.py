"""Maps f of importance weights w = pi_e(a|x) / pi_0(a|x), which the forms of `means` apply."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offtower.evaluation.estimators.base import Estimator, need_max_weight
from offtower.evaluation.rows import Array


@dataclass(frozen=True)
class Identity(Estimator):
    """f(w) = w."""

    def weight(self, importance_weight: Array) -> Array:
        """f(w)."""
        return importance_weight

    def peak(self, max_weight: float | None) -> float:
        """Largest value of f over [0, max_weight]."""
        return need_max_weight(self.label, max_weight)


@dataclass(frozen=True)
class Clipped(Identity):
    """f(w) = min(w, c). max_weight: c, from 0 to infinity (the identity)."""

    max_weight: float

    def __post_init__(self) -> None:
        self._check_parameter("max_weight", 0.0)

    def weight(self, importance_weight: Array) -> Array:
        return np.minimum(importance_weight, self.max_weight)

    def peak(self, max_weight: float | None) -> float:
        return _cut_peak(self, self.max_weight, max_weight)


@dataclass(frozen=True)
class Switched(Identity):
    """f(w) = w 1[w <= t]. threshold: t, from 0 to infinity (the identity)."""

    threshold: float

    def __post_init__(self) -> None:
        self._check_parameter("threshold", 0.0)

    def weight(self, importance_weight: Array) -> Array:
        return np.where(importance_weight <= self.threshold, importance_weight, 0.0)

    def peak(self, max_weight: float | None) -> float:
        return _cut_peak(self, self.threshold, max_weight)


@dataclass(frozen=True)
class Shrunk(Identity):
    """f(w) = s w / (w^2 + s), at most sqrt(s) / 2. shrinkage: s, from 0 to infinity (identity)."""

    shrinkage: float

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
class SubGaussian(Identity):
    """f(w) = w / (1 - lambda + lambda w), 0 at w = 0. lambda_: in [0, 1]; 0 is the identity."""

    lambda_: float

    def __post_init__(self) -> None:
        self._check_parameter("lambda_", 0.0, 1.0)

    def weight(self, importance_weight: Array) -> Array:
        below = (1.0 - self.lambda_) + self.lambda_ * importance_weight
        zero = np.zeros_like(importance_weight)
        return np.divide(importance_weight, below, out=zero, where=below > 0.0)

    def peak(self, max_weight: float | None) -> float:
        if self.lambda_ > 0.0 and max_weight is None:
            return 1.0 / self.lambda_
        return float(self.weight(np.array([need_max_weight(self.label, max_weight)]))[0])


def _cut_peak(estimator: Estimator, cut: float, max_weight: float | None) -> float:
    if np.isinf(cut):
        return need_max_weight(estimator.label, max_weight)
    return min(cut, np.inf if max_weight is None else max_weight)
