"""Squared error over the whole catalogue: rewarded items towards 1, all items towards 0."""

from __future__ import annotations

import torch

from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    Requirements,
    fraction,
    positive,
    provided,
)


class ImplicitSquares(Objective):
    r"""Minimize mean_i 1[r_i > 0] alpha sum_a s(x_i, a)^2 + min(1 / pscore_i^t, c) r_i (1 - s_i)^2.

    s = <u, v_a> + b_a, without temperature. All items are pulled towards 0 with weight alpha and
    rewarded ones towards 1. As under a likelihood, an item that the log never shows keeps a low
    score; unlike there, each item has its own least-squares problem and does not compete with the
    others. The sum over items is u^T (V^T V) u, so a step costs O(N d^2) and no exponentials,
    independent of the batch size. Scores lie between 0 and 1, so the policy needs a small
    temperature: .05 by default (`objective: auto` chooses it).

    Source: Hu, Koren, Volinsky 2008, "Collaborative filtering for implicit feedback datasets";
    Rendle et al. 2022, "Revisiting the performance of iALS on item recommendation benchmarks"; the
    weights as in Saito et al. 2020, "Unbiased recommender learning from missing-not-at-random
    implicit feedback", from logged propensities.

    Args:
        alpha: weight of all items.
        max_weight: c.
        smoothing: t in (0, 1].
    """

    name = "implicit_squares"
    requirements = Requirements(
        policy_terms=False,
        nonnegative_reward=True,
        square_sum=True,
        rewarded_rows_only=True,
        slates=None,
    )

    def __init__(
        self, alpha: float = 0.1, max_weight: float = 10.0, smoothing: float = 1.0
    ) -> None:
        self.alpha = positive("alpha", alpha)
        self.max_weight = positive("max_weight", max_weight)
        self.smoothing = fraction("smoothing", smoothing)

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        weight = rows.inverse_propensity(self.smoothing, self.max_weight) * rows.reward
        scores = rows.scores()
        square_sum = provided(scores.square_sum, "square_sum")
        all_items = torch.where(rows.reward > 0, self.alpha * square_sum, 0.0)
        error = torch.square(1.0 - scores.action_logit)
        per_row = all_items + weight * error
        return ObjectiveValue(reduction.mean(per_row), -reduction.average(per_row))
