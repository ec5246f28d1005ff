"""Supervised baselines: the likelihood of rewarded items, as two-tower retrievers usually learn."""

from __future__ import annotations

from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction


class Softmax(Objective):
    r"""Maximise mean_i r_i log pi(a_i|x_i): what was rewarded is likely, whoever chose to show it.

    Gradient: mean_i r_i grad log pi(a_i|x_i). Needs no propensities, and therefore learns the
    logging policy's taste along with the users': an item that is shown ten times as often is ten
    times as likely to be a positive. Rows without reward take part as negatives only.
    With `training.terms: sampled` this is the sampled softmax with logQ correction.
    Source: Covington, Adams and Sargin 2016, "Deep neural networks for YouTube recommendations".
    """

    name = "softmax"
    needs_pscore = False
    needs_nonnegative_reward = True
    needs_rewarded_rows_only = True

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        log_likelihood = rows.reward * rows.policy_terms().log_prob
        # The likelihood is no value of a policy; where there are propensities, the IPS estimate is.
        value = log_likelihood if rows.pscore is None else rows.weight() * rows.reward
        return ObjectiveValue(-over.mean(log_likelihood), over.average(value))


class InBatchSoftmax(Softmax):
    r"""`Softmax` whose normaliser is estimated from the other rows' items, with logQ correction.

    log pi^ = s_a - log(exp s_a + sum_{rows j, a_j != a} exp(s_j) / ((B - 1) f(a_j))), f being the
    item's share of the log. Items that were never logged have no part in it, in training: they are
    neither pushed down nor up.
    Source: Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item
    recommendations" (RecSys); the positive stays uncorrected, see `ops.sampled_policy_terms`.
    """

    name = "in_batch_softmax"
    proposal = "in_batch"


class MixedNegatives(Softmax):
    r"""`Softmax` whose normaliser is estimated from the other rows' items and from uniform draws.

    `sampling.num_samples` is the number of uniform draws.
    Source: Yang et al. 2020, "Mixed negative sampling for learning two-tower neural networks in
    recommendations" (WWW companion).
    """

    name = "mixed_negatives"
    proposal = "mixed"
