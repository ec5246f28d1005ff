"""IPS for slates of K items."""

from __future__ import annotations

import torch

from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    Requirements,
    clipped,
    positive,
)


class TopKCorrectedIPS(Objective):
    r"""IPS for a slate of K items drawn independently from one softmax.

    Gradient: mean_i min(w_i, c) K (1 - pi(a_i|x_i))^(K-1) r_i grad log pi(a_i|x_i). An item is in
    the slate with probability 1 - (1 - pi)^K, whose derivative has this factor. K = 1 is clipped
    IPS. The reported value is that of single draws, mean_i min(w_i, c) r_i.

    It wins where K distinct items are shown: with expected rewards .5, .45, .4, .1, .05, 0 and
    K = 3 the expected sum over distinct items is .95; IPS ends at .5, since it shows one item
    (tests/objectives/test_top_k.py).
    Source: Chen et al. 2019, "Top-K off-policy correction for a REINFORCE recommender system"
    (WSDM), equation 6.

    Args:
        k: items of a slate. max_weight: c.
    """

    name = "top_k_ips"
    requirements = Requirements(slates="rows")

    def __init__(self, k: int = 10, max_weight: float = 100.0) -> None:
        self.k = int(positive("k", k))
        self.max_weight = positive("max_weight", max_weight)

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        weight = clipped(rows.weight(), self.max_weight)
        log_prob = rows.policy_terms().log_prob
        probability = log_prob.detach().exp().clamp(max=1.0)
        factor = self.k * torch.pow(1.0 - probability, self.k - 1)
        return ObjectiveValue(
            -reduction.mean(weight * factor * rows.reward * log_prob),
            reduction.average(weight * rows.reward),
        )
