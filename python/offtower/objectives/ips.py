"""Inverse propensity scoring: plain, clipped and self-normalized."""

from __future__ import annotations

from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    clipped,
    positive,
)


class IPS(Objective):
    r"""Maximize mean_i w_i r_i with w_i = pi(a_i|x_i) / pscore_i.

    Gradient: mean_i w_i r_i grad log pi(a_i|x_i). Unbiased where pscore > 0 wherever pi > 0; the
    variance grows with the weights.
    Source: Strehl et al. 2010, "Learning from Logged Implicit Exploration Data"; as a learning
    objective, Swaminathan and Joachims 2015 (JMLR 16).
    """

    name = "ips"

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        contribution = rows.weight() * rows.reward
        return ObjectiveValue(-reduction.mean(contribution), reduction.average(contribution))


class ClippedIPS(Objective):
    r"""IPS with a clipped weight that is held constant.

    Gradient: mean_i min(w_i, c) r_i grad log pi(a_i|x_i). Rows beyond the clip keep a gradient,
    which differentiating min(w, c) would set to zero. Biased towards small weights.
    Source: Ionides 2008, "Truncated importance sampling".

    Args:
        max_weight: c.
    """

    name = "clipped_ips"

    def __init__(self, max_weight: float = 100.0) -> None:
        self.max_weight = positive("max_weight", max_weight)

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        weight = clipped(rows.weight(), self.max_weight)
        log_prob = rows.policy_terms().log_prob
        return ObjectiveValue(
            -reduction.mean(weight * rows.reward * log_prob),
            reduction.average(weight * rows.reward),
        )


class SNIPS(Objective):
    r"""Maximize V = sum_i w_i r_i / sum_i w_i over the rows of a step.

    Gradient: sum_i w_i (r_i - V) grad log pi(a_i|x_i) / sum_i w_i. Invariant to shifts of the
    reward, so moving mass off the logged items gains nothing. The sums in V and in the denominator
    cover all workers. V of a minibatch is a ratio with a bias of order 1 / effective sample size.
    Source: Swaminathan and Joachims 2015, "The self-normalized estimator for counterfactual
    learning" (NeurIPS).
    """

    name = "snips"

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        weight = rows.weight()
        total_weight = reduction.total(weight).clamp_min(1e-30)
        value = reduction.total(weight * rows.reward) / total_weight
        centered = weight * (rows.reward - value)
        return ObjectiveValue(-reduction.sum(centered) / total_weight, value)
