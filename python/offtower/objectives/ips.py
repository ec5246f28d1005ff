"""Inverse propensity scoring: the plain, the clipped and the self-normalised objective."""

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
    r"""Maximise mean_i w_i r_i with w_i = pi(a_i|x_i) / pscore_i.

    Gradient: mean_i w_i r_i grad log pi(a_i|x_i). Unbiased where pscore > 0 wherever pi > 0;
    variance grows with the weights. Source: Strehl et al. 2010, "Learning from Logged Implicit
    Exploration Data"; as a learning objective, Swaminathan and Joachims 2015 (JMLR 16).
    """

    name = "ips"

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        contribution = rows.weight() * rows.reward
        return ObjectiveValue(-over.mean(contribution), over.average(contribution))


class ClippedIPS(Objective):
    r"""IPS whose weight is clipped and held constant.

    Gradient: mean_i min(w_i, c) r_i grad log pi(a_i|x_i), so that rows beyond the clip still
    push (differentiating min(w, c) would silence them). Biased towards small weights.
    Source: Ionides 2008, "Truncated importance sampling".
    """

    name = "clipped_ips"

    def __init__(self, max_weight: float = 100.0) -> None:
        self.max_weight = positive("max_weight", max_weight)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        weight = clipped(rows.weight(), self.max_weight)
        log_prob = rows.policy_terms().log_prob
        return ObjectiveValue(
            -over.mean(weight * rows.reward * log_prob), over.average(weight * rows.reward)
        )


class SNIPS(Objective):
    r"""Maximise V = sum_i w_i r_i / sum_i w_i over the step's rows.

    Gradient: sum_i w_i (r_i - V) grad log pi(a_i|x_i) / sum_i w_i. Invariant to shifts of the
    reward, so it does not gain by moving mass off the log. The sums in V and in the denominator
    span all workers. A minibatch's V is a ratio: biased of order 1 / effective sample size.
    Source: Swaminathan and Joachims 2015, "The self-normalized estimator for counterfactual
    learning" (NeurIPS).
    """

    name = "snips"

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        weight = rows.weight()
        total_weight = over.total(weight).clamp_min(1e-30)
        value = over.total(weight * rows.reward) / total_weight
        centred = weight * (rows.reward - value)
        return ObjectiveValue(-over.sum(centred) / total_weight, value)
