"""Likelihood of logged items, weighted by reward and logged propensity, by reward, or evenly."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from offtower.errors import ConfigError
from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    Requirements,
    clipped,
    fraction,
    positive,
)


class _Likelihood(Objective):
    """Maximize mean_i c_i log pi(a_i|x_i) with constant coefficients c_i.

    A likelihood is not a policy value. Where propensities are logged, the reported value is the IPS
    estimate.
    """

    @abstractmethod
    def coefficient(self, rows: LoggedRows) -> Tensor:
        """(B,) c."""

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        log_likelihood = self.coefficient(rows) * rows.policy_terms().log_prob
        value = log_likelihood if rows.pscore is None else rows.weight() * rows.reward
        return ObjectiveValue(-reduction.mean(log_likelihood), reduction.average(value))


class WeightedLikelihood(_Likelihood):
    r"""Maximize mean_i min(1 / pscore_i^s, c) r_i log pi(a_i|x_i).

    Gradient: mean_i min(1 / pscore_i^s, c) r_i grad log pi(a_i|x_i). Concave in the logits, hence
    without the plateaus of IPS. It fits the reward-weighted distribution of items instead of
    maximizing the value. With s < 1 the weights vary less, at the cost of a bias towards the
    logging policy.
    Source: Ma, Wang and Chen 2019, "Imitation-regularized offline learning"; Dayan and Hinton 1997
    (reward-weighted regression); s as in Aouali et al. 2023, "Exponential smoothing for off-policy
    learning".

    Args:
        max_weight: c.
        smoothing: s in (0, 1].
    """

    name = "weighted_likelihood"
    requirements = Requirements(nonnegative_reward=True, rewarded_rows_only=True)

    def __init__(self, max_weight: float = 100.0, smoothing: float = 1.0) -> None:
        self.max_weight = positive("max_weight", max_weight)
        self.smoothing = fraction("smoothing", smoothing)

    def coefficient(self, rows: LoggedRows) -> Tensor:
        return rows.inverse_propensity(self.smoothing, self.max_weight) * rows.reward


class BehaviorCloning(_Likelihood):
    r"""Maximize mean_i log pi(a_i|x_i) over all logged rows.

    Gradient: mean_i grad log pi(a_i|x_i). The optimum is the logging policy, as far as the towers
    can represent it. Use it as a start (`training.warm_start`) or as an estimate of the logging
    policy (`objective.kl_policy`). Needs neither propensities nor rewards.

    With `known_propensities` it minimizes mean_i (w_i - 1 - log w_i) with w_i = pi(a_i|x_i) /
    pscore_i, whose gradient is mean_i (w_i - 1) grad log pi(a_i|x_i). Both have the same
    expectation, KL(pi_0 || pi) and its gradient, because that of w grad log pi is 0. The second is
    0 in every row where pi is the logging policy, so rows that happen to be logged often are not
    overfitted. A weight above c counts as c in the gradient, which then starts bounded.
    Source: Pomerleau 1991, "Efficient training of artificial neural networks for autonomous
    navigation"; as the imitation term of Ma, Wang and Chen 2019. The estimate of the divergence:
    Schulman 2020, "Approximating KL divergence".

    Args:
        known_propensities: match the logged propensities; not for slates.
        max_weight: c, at least 1.

    Raises:
        ConfigError: `max_weight` is below 1.
    """

    name = "behavior_cloning"
    requirements = Requirements(pscore=False, slates="conditional")

    def __init__(self, known_propensities: bool = False, max_weight: float = 10.0) -> None:
        if max_weight < 1.0:
            raise ConfigError(
                f"objective setting 'max_weight' must be at least 1, got {max_weight!r}"
            )
        self.max_weight = positive("max_weight", max_weight)
        self.known_propensities = known_propensities
        if known_propensities:
            self.requirements = Requirements(slates=None)

    def coefficient(self, rows: LoggedRows) -> Tensor:
        if not self.known_propensities:
            return torch.ones_like(rows.reward)
        return 1.0 - clipped(rows.weight(), self.max_weight)


class Softmax(_Likelihood):
    r"""Maximize mean_i r_i log pi(a_i|x_i), the usual loss of two-tower retrieval.

    Gradient: mean_i r_i grad log pi(a_i|x_i). Needs no propensities, and therefore inherits the
    logging policy's preferences: an item that is shown ten times as often is ten times as likely to
    be a positive. Rows without reward only take part as negatives. With `training.terms: sampled`
    this is the sampled softmax with logQ correction.
    Source: Covington, Adams and Sargin 2016, "Deep neural networks for YouTube recommendations".
    """

    name = "softmax"
    requirements = Requirements(
        pscore=False, nonnegative_reward=True, rewarded_rows_only=True, slates="rows"
    )

    def coefficient(self, rows: LoggedRows) -> Tensor:
        return rows.reward


class InBatchSoftmax(Softmax):
    r"""`Softmax` with a normalizer estimated from the batch's other items, with logQ correction.

    log pi^ = s_a - log(exp s_a + sum_{rows j, a_j != a} exp(s_j) / ((B - 1) f(a_j))), where f is
    the item's share of the log. Items that were never logged do not take part in training.
    Source: Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item
    recommendations" (RecSys); the positive stays uncorrected, see `ops.sampled_policy_terms`.
    """

    name = "in_batch_softmax"
    requirements = Requirements(
        pscore=False,
        nonnegative_reward=True,
        rewarded_rows_only=True,
        proposal="in_batch",
        slates="rows",
    )


class MixedNegatives(Softmax):
    r"""`Softmax` with a normalizer estimated from the batch's other items and uniform draws.

    `sampling.num_samples` is the number of uniform draws.
    Source: Yang et al. 2020, "Mixed negative sampling for learning two-tower neural networks in
    recommendations" (WWW companion).
    """

    name = "mixed_negatives"
    requirements = Requirements(
        pscore=False,
        nonnegative_reward=True,
        rewarded_rows_only=True,
        proposal="mixed",
        slates="rows",
    )
