"""Squares over the whole catalogue: rewarded items towards 1, all items towards 0."""

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


class ImplicitSquares(Objective):
    r"""Minimise mean_i 1[r_i > 0] alpha sum_a s(x_i, a)^2 + min(1 / pscore_i^t, c) r_i (1 - s_i)^2.

    s = <u, v_a> + b_a, without temperature. Every item of the catalogue is pulled towards 0 with
    weight alpha, seen or not, and what was rewarded towards 1: a label that the log never shows
    stays low, as under a likelihood, but each item has a least-squares problem of its own, and none
    has to give way for another to rise. The sum over items is u^T (V^T V) u: a step costs O(N d^2)
    and no exponential, however many rows it has. Scores lie between 0 and 1, so the policy needs a
    small temperature (`objective: auto` chooses it).

    Source: Hu, Koren, Volinsky 2008, "Collaborative filtering for implicit feedback datasets", and
    Rendle et al. 2022, "Revisiting the performance of iALS on item recommendation benchmarks"; the
    weights as Saito et al. 2020, "Unbiased recommender learning from missing-not-at-random implicit
    feedback", from logged propensities.

    Args:
        alpha: weight of all items.
        max_weight: c.
        smoothing: t in (0, 1].
    """

    name = "implicit_squares"
    uses_policy = False
    needs_nonnegative_reward = True
    needs_rewarded_rows_only = True
    needs_square_sum = True

    def __init__(
        self, alpha: float = 0.1, max_weight: float = 10.0, smoothing: float = 1.0
    ) -> None:
        self.alpha = positive("alpha", alpha)
        self.max_weight = positive("max_weight", max_weight)
        self.smoothing = share("smoothing", smoothing)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        assert rows.pscore is not None and rows.action_logit is not None
        assert rows.square_sum is not None
        weight = rows.pscore.pow(-self.smoothing).clamp(max=self.max_weight)
        weight = weight.to(rows.reward.dtype) * rows.reward
        everything = torch.where(rows.reward > 0, self.alpha * rows.square_sum, 0.0)
        per_row = everything + weight * torch.square(1.0 - rows.action_logit)
        return ObjectiveValue(over.mean(per_row), -over.average(per_row))
