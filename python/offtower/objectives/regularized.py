"""KL, imitation and entropy regularization, added to any objective with policy terms."""

from __future__ import annotations

from dataclasses import replace

import torch

from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    nonnegative,
    provided,
)


class Regularized(Objective):
    r"""Maximize objective - kl KL^ + imitation mean_i l_i + entropy mean_i h_i.

    l_i = log pi(a_i|x_i), h_i is the entropy of pi(.|x_i).

    - `kl`: KL^ = mean_i (w_i log w_i - w_i + 1), an unbiased, nonnegative estimate of
      KL(pi || pi_0) from logged propensities. Gradient: mean_i w_i log w_i grad l_i.
      Source: Schulman 2020, "Approximating KL divergence".
      With `exact_kl` it is the mean of the exact KL(pi(.|x_i) || pi_ref(.|x_i)) to a stored
      reference policy, which needs no propensities.
      Gradient: mean_i sum_a pi log(pi / pi_ref) grad log pi.
      Source: Jaques et al. 2017, "Sequence tutor"; Ziegler et al. 2019, "Fine-tuning language
      models from human preferences".
    - `imitation`: likelihood of all logged items, which is -KL(pi_0 || pi) up to a constant.
      Gradient: mean_i grad l_i. Source: Ma, Wang, Chen 2019, "Imitation-regularized offline
      learning" (AISTATS).
    - `entropy`: gradient mean_i grad h_i. Source: Williams and Peng 1991.

    The reported value is that of the objective alone.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        kl: float = 0.0,
        imitation: float = 0.0,
        entropy: float = 0.0,
        exact_kl: bool = False,
    ) -> None:
        self.objective = objective
        self.name = objective.name
        self.kl = nonnegative("kl", kl)
        self.imitation = nonnegative("imitation", imitation)
        self.entropy = nonnegative("entropy", entropy)
        needs = objective.requirements
        self.requirements = replace(
            needs,
            divergence=exact_kl and self.kl > 0.0,
            pscore=needs.pscore or (self.kl > 0.0 and not exact_kl),
            entropy=needs.entropy or self.entropy > 0.0,
            # The added terms depend on rows without reward too.
            rewarded_rows_only=False,
        )

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        result = self.objective(rows, reduction)
        loss = result.loss
        if self.requirements.divergence:
            loss = loss + self.kl * reduction.mean(provided(rows.divergence, "divergence"))
        elif self.kl > 0.0:
            log_weight = rows.log_weight()
            divergence = log_weight.exp() * log_weight - torch.expm1(log_weight)
            loss = loss + self.kl * reduction.mean(divergence)
        if self.imitation > 0.0:
            loss = loss - self.imitation * reduction.mean(rows.policy_terms().log_prob)
        if self.entropy > 0.0:
            entropy = provided(rows.policy_terms().entropy, "entropy")
            loss = loss - self.entropy * reduction.mean(entropy)
        return ObjectiveValue(loss, result.value)
