"""Doubly robust objectives: a reward model for all items, corrected on the logged ones."""

from __future__ import annotations

from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    clipped,
    positive,
)


class DoublyRobust(Objective):
    r"""Maximise mean_i [ w_i (r_i - q_i) + m_i ], m_i = sum_a pi(a|x_i) q(x_i, a).

    Gradient: mean_i [ w_i (r_i - q_i) grad log pi(a_i|x_i) + sum_a q(x_i,a) grad pi(a|x_i) ].
    Unbiased if the propensities or the reward model are right.
    Source: Dudik, Erhan, Langford, Li 2014, "Doubly Robust Policy Evaluation and Optimization".
    """

    name = "dr"
    needs_reward_model = True

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        contribution = rows.weight() * rows.residual() + rows.expected_reward()
        return ObjectiveValue(-over.mean(contribution), over.average(contribution))


class ClippedDoublyRobust(Objective):
    r"""DR whose correction uses a clipped weight, held constant.

    Gradient: mean_i [ min(w_i, c) (r_i - q_i) grad log pi(a_i|x_i) + grad m_i ].
    Source: Dudik et al. 2014; clipping as Su et al. 2020, "Doubly robust off-policy evaluation
    with shrinkage" (pessimistic shrinkage).
    """

    name = "clipped_dr"
    needs_reward_model = True

    def __init__(self, max_weight: float = 100.0) -> None:
        self.max_weight = positive("max_weight", max_weight)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        weight = clipped(rows.weight(), self.max_weight)
        residual, expected = rows.residual(), rows.expected_reward()
        log_prob = rows.policy_terms().log_prob
        return ObjectiveValue(
            -over.mean(weight * residual * log_prob + expected),
            over.average(weight * residual + expected),
        )
