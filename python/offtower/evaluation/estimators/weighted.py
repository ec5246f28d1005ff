"""Estimators of weighted rewards: no reward model.

w_i = pi_e(a_i|x_i) / pi_0(a_i|x_i), r_i the reward, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.estimators.base import Estimator, need_max_weight
from offtower.evaluation.rows import Array, EvaluationRows


class WeightedMean(Estimator):
    """mean f(w_i) r_i for a weight map f that does not decrease up to its peak."""

    def weight(self, importance_weight: Array) -> Array:
        """f(w)."""
        return importance_weight

    def peak(self, max_weight: float | None) -> float:
        """Largest value of f over [0, max_weight]."""
        return need_max_weight(self.label, max_weight)

    def terms(self, rows: EvaluationRows) -> Array:
        return (self.weight(rows.importance_weight) * rows.reward)[:, None]

    def bounds(
        self, reward_range: tuple[float, float], max_weight: float | None
    ) -> tuple[float, float]:
        low, high = reward_range
        peak = self.peak(max_weight)
        return min(0.0, peak * low), max(0.0, peak * high)


@dataclass(frozen=True)
class IPS(WeightedMean):
    """Inverse propensity score: V = mean w r (Horvitz and Thompson 1952). Unbiased."""

    label: ClassVar[str] = "ips"
    consistent: ClassVar[bool] = True


@dataclass(frozen=True)
class ClippedIPS(WeightedMean):
    """V = mean min(w, c) r (Ionides 2008; Bottou et al. 2013).

    max_weight: c, from 0; infinity is IPS.
    """

    max_weight: float
    label: ClassVar[str] = "clipped_ips"

    def __post_init__(self) -> None:
        self._check_parameter("max_weight", 0.0)

    def weight(self, importance_weight: Array) -> Array:
        return np.minimum(importance_weight, self.max_weight)

    def peak(self, max_weight: float | None) -> float:
        if np.isinf(self.max_weight):
            return need_max_weight(self.label, max_weight)
        return min(self.max_weight, np.inf if max_weight is None else max_weight)


@dataclass(frozen=True)
class SubGaussianIPS(WeightedMean):
    """V = mean w r / (1 - lambda + lambda w) (Metelli, Russo, Restelli, NeurIPS 2021, s = -1).

    lambda_: in [0, 1]; 0 is IPS.
    """

    lambda_: float
    label: ClassVar[str] = "sub_gaussian_ips"

    def __post_init__(self) -> None:
        self._check_parameter("lambda_", 0.0, 1.0)

    def weight(self, importance_weight: Array) -> Array:
        return sub_gaussian(importance_weight, self.lambda_)

    def peak(self, max_weight: float | None) -> float:
        if self.lambda_ > 0.0 and max_weight is None:
            return 1.0 / self.lambda_
        return float(self.weight(np.array([need_max_weight(self.label, max_weight)]))[0])


@dataclass(frozen=True)
class LogSmoothing(Estimator):
    """V = mean log(1 + lambda w r) / lambda (Sakhi, Aouali, Alquier, Chopin, NeurIPS 2024).

    Its bias is downwards: a cautious value. Rewards must not be negative.
    lambda_: from 0; 0 is IPS.
    """

    lambda_: float
    label: ClassVar[str] = "log_smoothing"

    def __post_init__(self) -> None:
        self._check_parameter("lambda_", 0.0)

    def terms(self, rows: EvaluationRows) -> Array:
        if rows.n and rows.reward.min() < 0.0:
            raise OfftowerError(
                f"log_smoothing needs rewards that are not negative; the least is "
                f"{rows.reward.min():g}. Shift the rewards"
            )
        product = rows.importance_weight * rows.reward
        if self.lambda_ > 0.0:
            product = np.log1p(self.lambda_ * product) / self.lambda_
        return product[:, None]

    def bounds(
        self, reward_range: tuple[float, float], max_weight: float | None
    ) -> tuple[float, float]:
        top = need_max_weight(self.label, max_weight) * reward_range[1]
        return 0.0, float(np.log1p(self.lambda_ * top) / self.lambda_) if self.lambda_ else top


@dataclass(frozen=True)
class SNIPS(Estimator):
    """Self-normalised: V = sum w r / sum w (Swaminathan and Joachims, NeurIPS 2015).

    Standard error by the delta method: variance of w (r - V) / mean(w), over n.
    """

    label: ClassVar[str] = "snips"
    num_terms: ClassVar[int] = 2
    consistent: ClassVar[bool] = True

    def terms(self, rows: EvaluationRows) -> Array:
        weight = rows.importance_weight
        return np.stack([weight, weight * rows.reward], axis=1)

    def combine(self, mean: Array) -> Array:
        return mean[..., 1] / mean[..., 0]

    def gradient(self, mean: Array) -> Array:
        return np.array([-mean[1] / mean[0] ** 2, 1.0 / mean[0]])


@dataclass(frozen=True)
class MIPS(WeightedMean):
    """Marginalised over clusters: V = mean w_c r, w_c = pi_e(c|x) / pi_0(c|x) (Saito and Joachims,
    ICML 2022, eq. 5).

    Unbiased where the items of a cluster have the same expected reward in a context; its weights
    are never more spread than w. Reads `cluster_weight` of the rows.
    """

    label: ClassVar[str] = "mips"

    def terms(self, rows: EvaluationRows) -> Array:
        if rows.cluster_weight is None:
            raise OfftowerError(
                "mips needs cluster_weight in the rows: the target's probability of the logged "
                "item's cluster over the logging policy's (estimators.cluster_weight)"
            )
        return (rows.cluster_weight * rows.reward)[:, None]


def sub_gaussian(weight: Array, lambda_: float) -> Array:
    """Harmonic correction of the weights: w / (1 - lambda + lambda w), 0 at w = 0."""
    below = (1.0 - lambda_) + lambda_ * weight
    return np.divide(weight, below, out=np.zeros_like(weight), where=below > 0.0)


def cluster_weight(target: Array, behavior: Array, cluster: Array, action: Array) -> Array:
    """(n,) weights of the logged items' clusters, for MIPS.

    target, behavior: (n, A) probabilities of both policies. cluster: (A,) cluster of each item, in
    [0, C). action: (n,) logged items. Holds (n, C) numbers: for catalogues that fit.
    Raises OfftowerError where a logged cluster has no probability under the logging policy.
    """
    cluster = np.asarray(cluster, dtype=np.int64)
    logged = cluster[np.asarray(action, dtype=np.int64)]
    same = cluster[None, :] == logged[:, None]
    below = np.where(same, behavior, 0.0).sum(axis=1)
    if (below <= 0.0).any():
        raise OfftowerError(
            f"the logging policy gives the logged cluster of row {int(np.argmax(below <= 0.0))} "
            "no probability; check behavior and cluster"
        )
    return np.where(same, target, 0.0).sum(axis=1) / below
