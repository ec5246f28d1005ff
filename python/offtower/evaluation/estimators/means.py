"""Estimators that are a mean over rows: a weight map in the form w r, or in the doubly robust one.

w_i = pi_e(a_i|x_i) / pi_0(a_i|x_i), r_i the reward, q_i = q(x_i, a_i) the reward model's prediction
and m_i = sum_a pi_e(a|x_i) q(x_i, a) its mean under the evaluated policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.estimators.base import (
    Estimator,
    expected_terms,
    need_max_weight,
    reward_terms,
)
from offtower.evaluation.estimators.weight_maps import (
    Clipped,
    Identity,
    Shrunk,
    SubGaussian,
    Switched,
)
from offtower.evaluation.rows import Array, EvaluationRows


class WeightedMean(Identity):
    """mean f(w_i) r_i for a weight map f."""

    def terms(self, rows: EvaluationRows) -> Array:
        return (self.weight(rows.importance_weight) * rows.reward)[:, None]

    def bounds(
        self, reward_range: tuple[float, float], max_weight: float | None
    ) -> tuple[float, float]:
        low, high = reward_range
        peak = self.peak(max_weight)
        return min(0.0, peak * low), max(0.0, peak * high)


class DoublyRobustMean(Identity):
    """mean f(w_i) (r_i - q_i) + m_i for a weight map f.

    Of slates: mean over rounds of sum_k f(w_{1:k}) (r_k - q_k) + f(w_{1:k-1}) E_pi[q_k | x, a_<k],
    the cascade DR of Kiyohara et al. (WSDM 2022) with a reward model of each position.
    """

    needs_reward_model: ClassVar[bool] = True

    def terms(self, rows: EvaluationRows) -> Array:
        action_reward, expected_reward = reward_terms(rows, self.label)
        weight = self.weight(rows.importance_weight)
        expected = expected_terms(rows, expected_reward, self.weight)
        return (weight * (rows.reward - action_reward) + expected)[:, None]

    def bounds(
        self, reward_range: tuple[float, float], max_weight: float | None
    ) -> tuple[float, float]:
        """Predictions are taken to lie in the reward range too."""
        low, high = reward_range
        reach = self.peak(max_weight) * (high - low)
        return low - reach, high + reach


class IPS(WeightedMean):
    """Inverse propensity score: V = mean w r (Horvitz and Thompson 1952). Unbiased."""

    label: ClassVar[str] = "ips"
    consistent: ClassVar[bool] = True


class DR(DoublyRobustMean):
    """V = mean w (r - q) + m (Dudik, Langford, Li, ICML 2011). Unbiased."""

    label: ClassVar[str] = "dr"
    consistent: ClassVar[bool] = True


class ClippedIPS(Clipped, WeightedMean):
    """V = mean min(w, c) r (Ionides 2008; Bottou et al. 2013). max_weight: c; infinity is IPS."""

    label: ClassVar[str] = "clipped_ips"


class ClippedDR(Clipped, DoublyRobustMean):
    """V = mean min(w, c) (r - q) + m (Wang, Agarwal, Dudik, ICML 2017; Su et al. 2020).

    max_weight: c, from 0 (DM) to infinity (DR).
    """

    label: ClassVar[str] = "clipped_dr"


class SwitchDR(Switched, DoublyRobustMean):
    """V = mean w 1[w <= t] (r - q) + m (Wang, Agarwal, Dudik, ICML 2017).

    threshold: t, from 0 (DM) to infinity (DR).
    """

    label: ClassVar[str] = "switch_dr"


class DRos(Shrunk, DoublyRobustMean):
    """Optimistic shrinkage: V = mean (s w / (w^2 + s)) (r - q) + m (Su, Dimakopoulou,
    Krishnamurthy, Dudik, ICML 2020).

    shrinkage: s, from 0 (DM) to infinity (DR).
    """

    label: ClassVar[str] = "dros"


class SubGaussianIPS(SubGaussian, WeightedMean):
    """V = mean w r / (1 - lambda + lambda w) (Metelli, Russo, Restelli, NeurIPS 2021, s = -1).

    lambda_: in [0, 1]; 0 is IPS.
    """

    label: ClassVar[str] = "sub_gaussian_ips"


class SubGaussianDR(SubGaussian, DoublyRobustMean):
    """V = mean w / (1 - lambda + lambda w) (r - q) + m (Metelli, Russo, Restelli, NeurIPS 2021).

    lambda_: in [0, 1]; 0 is DR.
    """

    label: ClassVar[str] = "sub_gaussian_dr"


class DM(Estimator):
    """Direct method: V = mean m (Beygelzimer and Langford 2009). As good as its model."""

    label: ClassVar[str] = "dm"
    needs_reward_model: ClassVar[bool] = True
    uses_weight: ClassVar[bool] = False

    def terms(self, rows: EvaluationRows) -> Array:
        if rows.rounds is not None and rows.rounds.longest > 1:
            raise OfftowerError(
                "dm has no form for slates: the expected reward of a position is over slates of "
                "the evaluated policy, and the log has those of another; use dr"
            )
        return reward_terms(rows, self.label)[1][:, None]

    def bounds(
        self, reward_range: tuple[float, float], max_weight: float | None
    ) -> tuple[float, float]:
        return reward_range


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


class MIPS(WeightedMean):
    """Marginalized over clusters: V = mean w_c r, w_c = pi_e(c|x) / pi_0(c|x) (Saito and Joachims,
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
    return np.asarray(np.where(same, target, 0.0).sum(axis=1) / below)
