"""Terms that keep a policy near the log or away from determinism, added to any objective."""

from __future__ import annotations

import torch

from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction, not_negative


class Regularised(Objective):
    r"""Maximise objective - kl KL^ + imitation mean_i l_i + entropy mean_i h_i.

    - `kl`: KL^ = mean_i (w_i log w_i - w_i + 1), unbiased for KL(pi || pi_0) from logged
      propensities alone, and never negative. Gradient: mean_i w_i log w_i grad l_i.
      Source: Schulman 2020, "Approximating KL divergence", for the form of least variance.
      With `known` it is the mean of the exact KL(pi(.|x_i) || pi_0(.|x_i)) to a stored logging
      policy: no noise, and no propensities. Gradient: mean_i sum_a pi log(pi / pi_0) grad log pi.
      Source: Jaques et al. 2017, "Sequence tutor"; Ziegler et al. 2019, "Fine-tuning language
      models from human preferences".
    - `imitation`: the likelihood of all logged items, which is -KL(pi_0 || pi) and a constant.
      Gradient: mean_i grad l_i. Source: Ma, Wang, Chen 2019, "Imitation-regularized offline
      learning" (AISTATS).
    - `entropy`: gradient mean_i grad h_i. Source: Williams and Peng 1991.

    The value reported is the objective's own.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        kl: float = 0.0,
        imitation: float = 0.0,
        entropy: float = 0.0,
        known: bool = False,
    ) -> None:
        self.objective = objective
        self.kl = not_negative("kl", kl)
        self.imitation = not_negative("imitation", imitation)
        self.entropy = not_negative("entropy", entropy)
        self.name = objective.name
        self.uses_policy = objective.uses_policy
        self.needs_divergence = known and self.kl > 0.0
        self.needs_pscore = objective.needs_pscore or (self.kl > 0.0 and not known)
        self.needs_reward_model = objective.needs_reward_model
        self.needs_nonnegative_reward = objective.needs_nonnegative_reward
        self.needs_entropy = objective.needs_entropy or self.entropy > 0.0
        self.proposal = objective.proposal

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        result = self.objective(rows, over)
        loss = result.loss
        if self.needs_divergence:
            loss = loss + self.kl * over.mean(rows.known_divergence())
        elif self.kl > 0.0:
            log_weight = rows.log_weight()
            divergence = log_weight.exp() * log_weight - torch.expm1(log_weight)
            loss = loss + self.kl * over.mean(divergence)
        if self.imitation > 0.0:
            loss = loss - self.imitation * over.mean(rows.policy_terms().log_prob)
        if self.entropy > 0.0:
            loss = loss - self.entropy * over.mean(rows.entropy())
        return ObjectiveValue(loss, result.value)
