"""Doubly robust objectives: a reward model for all items, corrected on the logged ones."""

from __future__ import annotations

from torch import Tensor

from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    Requirements,
    clipped,
    positive,
)


class DoublyRobust(Objective):
    r"""Maximize mean_i [ w_i (r_i - q_i) + m_i ], m_i = sum_a pi(a|x_i) q(x_i, a).

    Gradient: mean_i [ w_i (r_i - q_i) grad log pi(a_i|x_i) + sum_a q(x_i,a) grad pi(a|x_i) ].
    Unbiased if the propensities or the reward model are right.
    Source: Dudik, Erhan, Langford, Li 2014, "Doubly Robust Policy Evaluation and Optimization".
    """

    name = "dr"
    requirements = Requirements(reward_model=True)

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        contribution = rows.weight() * rows.residual() + rows.expected_reward()
        return ObjectiveValue(-reduction.mean(contribution), reduction.average(contribution))


class ClippedDoublyRobust(Objective):
    r"""DR with a clipped weight that is held constant in the correction.

    Gradient: mean_i [ min(w_i, c) (r_i - q_i) grad log pi(a_i|x_i) + grad m_i ].
    Source: Dudik et al. 2014; clipping as in Su et al. 2020, "Doubly robust off-policy evaluation
    with shrinkage" (pessimistic shrinkage).

    Args:
        max_weight: c.
    """

    name = "clipped_dr"
    requirements = Requirements(reward_model=True)

    def __init__(self, max_weight: float = 100.0) -> None:
        self.max_weight = positive("max_weight", max_weight)

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        weight = clipped(rows.weight(), self.max_weight)
        return dr_with_constant_weight(weight, rows, reduction, self.max_weight)


def dr_with_constant_weight(
    weight: Tensor, rows: LoggedRows, reduction: Reduction, max_weight: float = float("inf")
) -> ObjectiveValue:
    """DR with weights (B,) held constant: mean_i [ w_i (r_i - q_i) log pi(a_i|x_i) + m_i ].

    max_weight: of the items above a row in a slate.
    """
    residual = rows.residual()
    expected, value = rows.clipped_expected_reward(max_weight)
    log_prob = rows.policy_terms().log_prob
    return ObjectiveValue(
        -reduction.mean(weight * residual * log_prob + expected),
        reduction.average(weight * residual + value),
    )
