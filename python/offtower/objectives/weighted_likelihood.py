"""Likelihood of the logged items: of all alike, or weighted by reward and logged propensity."""

from __future__ import annotations

import torch

from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    positive,
    share,
)


class WeightedLikelihood(Objective):
    r"""Maximise mean_i min(1 / pscore_i^s, c) r_i log pi(a_i|x_i): no policy factor in the weight.

    Gradient: mean_i min(1 / pscore_i^s, c) r_i grad log pi(a_i|x_i). Concave in the logits, hence
    without the plateaus of IPS; it fits the reward-weighted distribution of items rather than
    maximising the value. With s below 1 weights vary less, and a part of the logging policy's
    taste is learned along. Source: Ma, Wang and Chen 2019, "Imitation-regularized offline
    learning"; Dayan and Hinton 1997 (reward-weighted regression); s as in Aouali et al. 2023,
    "Exponential smoothing for off-policy learning".

    Args:
        max_weight: c. smoothing: s in (0, 1].
    """

    name = "weighted_likelihood"
    needs_nonnegative_reward = True
    needs_rewarded_rows_only = True

    def __init__(self, max_weight: float = 100.0, smoothing: float = 1.0) -> None:
        self.max_weight = positive("max_weight", max_weight)
        self.smoothing = share("smoothing", smoothing)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        assert rows.pscore is not None
        weight = rows.pscore.pow(-self.smoothing).clamp(max=self.max_weight)
        weight = weight.to(rows.reward.dtype)
        log_likelihood = weight * rows.reward * rows.policy_terms().log_prob
        # The likelihood is no value of a policy; what is reported is the IPS estimate.
        return ObjectiveValue(-over.mean(log_likelihood), over.average(rows.weight() * rows.reward))


class ExponentialLikelihood(Objective):
    r"""Maximise mean_i min(exp(r_i / beta), c) log pi(a_i|x_i).

    Gradient: mean_i min(exp(r_i / beta), c) grad log pi(a_i|x_i). Its optimum is the policy
    proportional to pi_0(a|x) E[exp(r / beta) | x, a]: the best one for value - beta KL(pi || pi_0),
    up to the noise of rewards, so it stays near the log on purpose. Needs no propensities and takes
    rewards of any sign; the smaller beta, the farther from the log.
    Source: Peters and Schaal 2007, "Reinforcement learning by reward-weighted regression"; Peng,
    Kumar, Zhang, Levine 2019, "Advantage-weighted regression".
    """

    name = "exponential_likelihood"
    needs_pscore = False

    def __init__(self, beta: float = 0.3, max_weight: float = 100.0) -> None:
        self.beta = positive("beta", beta)
        self.max_weight = positive("max_weight", max_weight)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        weight = torch.exp(rows.reward / self.beta).clamp(max=self.max_weight)
        log_likelihood = weight * rows.policy_terms().log_prob
        # The likelihood is no value of a policy; where there are propensities, the IPS estimate is.
        value = log_likelihood if rows.pscore is None else rows.weight() * rows.reward
        return ObjectiveValue(-over.mean(log_likelihood), over.average(value))


class BehaviorCloning(Objective):
    r"""Maximise mean_i log pi(a_i|x_i) over all logged rows, whatever they earned.

    Gradient: mean_i grad log pi(a_i|x_i). Its optimum is the logging policy, as far as the towers
    can say it: a start for `training.warm_start`, and an estimate of a logging policy that nobody
    kept, for `objective.kl_policy`. Needs neither propensities nor rewards.
    Source: Pomerleau 1991, "Efficient training of artificial neural networks for autonomous
    navigation"; as the imitation term of Ma, Wang and Chen 2019.
    """

    name = "behavior_cloning"
    needs_pscore = False

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        log_likelihood = rows.policy_terms().log_prob
        # The likelihood is no value of a policy; where there are propensities, the IPS estimate is.
        value = log_likelihood if rows.pscore is None else rows.weight() * rows.reward
        return ObjectiveValue(-over.mean(log_likelihood), over.average(value))
