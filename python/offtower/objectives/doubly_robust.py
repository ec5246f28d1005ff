"""Doubly robust objectives: a reward model for all items, corrected on the logged ones."""

from __future__ import annotations

from torch import Tensor

from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    clipped,
    positive,
    share,
)


class DoublyRobust(Objective):
    r"""Maximise mean_i [ w_i (r_i - q_i) + m_i ], m_i = sum_a pi(a|x_i) q(x_i, a).

    Gradient: mean_i [ w_i (r_i - q_i) grad log pi(a_i|x_i) + sum_a q(x_i,a) grad pi(a|x_i) ].
    Unbiased if the propensities or the reward model are right. With `trust` t below 1 the reward
    model is shrunk to t q: nearer to IPS, still unbiased with right propensities, and less is
    believed about items that the log never showed.
    Source: Dudik, Erhan, Langford, Li 2014, "Doubly Robust Policy Evaluation and Optimization".

    Args:
        trust: t in (0, 1].
    """

    name = "dr"
    needs_reward_model = True

    def __init__(self, trust: float = 1.0) -> None:
        self.trust = share("trust", trust)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        contribution = rows.weight() * rows.residual(self.trust)
        contribution = contribution + self.trust * rows.expected_reward()
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
        return with_constant_weight(clipped(rows.weight(), self.max_weight), rows, over)


def with_constant_weight(weight: Tensor, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
    """DR whose weights (B,) are held constant: mean_i [ w_i (r_i - q_i) l_i + m_i ]."""
    residual, expected = rows.residual(), rows.expected_reward()
    log_prob = rows.policy_terms().log_prob
    return ObjectiveValue(
        -over.mean(weight * residual * log_prob + expected),
        over.average(weight * residual + expected),
    )


class OptimisticShrinkageDR(Objective):
    r"""DR whose correction uses weights shrunk by lambda / (lambda + w^2), differentiated.

    Value: mean_i [ h(w_i) (r_i - q_i) + m_i ], h(w) = lambda w / (w^2 + lambda).
    Gradient: mean_i [ lambda w_i (lambda - w_i^2) / (w_i^2 + lambda)^2 (r_i - q_i) grad l_i
    + grad m_i ]: h never exceeds sqrt(lambda) / 2, and rows far off the log fall silent.
    Source: Su, Dimakopoulou, Krishnamurthy, Dudik 2020, "Doubly robust off-policy evaluation with
    shrinkage" (ICML), section 4.
    """

    name = "shrinkage_dr"
    needs_reward_model = True

    def __init__(self, shrinkage: float = 100.0) -> None:
        self.shrinkage = positive("shrinkage", shrinkage)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        weight = rows.weight()
        # In this form a weight of 1e20 gives 0 and not infinity over infinity.
        shrunk = self.shrinkage / (weight + self.shrinkage / weight.clamp_min(1e-30))
        contribution = shrunk * rows.residual() + rows.expected_reward()
        return ObjectiveValue(-over.mean(contribution), over.average(contribution))
