"""Likelihood of the logged items, weighted by reward and logged propensity."""

from __future__ import annotations

from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction, positive


class WeightedLikelihood(Objective):
    r"""Maximise mean_i min(1 / pscore_i, c) r_i log pi(a_i|x_i): no policy factor in the weight.

    Gradient: mean_i min(1/pscore_i, c) r_i grad log pi(a_i|x_i). Concave in the logits, hence
    without the plateaus of IPS; it fits the reward-weighted distribution of items rather than
    maximising the value. Source: Ma, Wang and Chen 2019, "Imitation-regularized offline
    learning"; Dayan and Hinton 1997 (reward-weighted regression).
    """

    name = "weighted_likelihood"
    needs_nonnegative_reward = True

    def __init__(self, max_weight: float = 100.0) -> None:
        self.max_weight = positive("max_weight", max_weight)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        assert rows.pscore is not None
        weight = rows.pscore.reciprocal().clamp(max=self.max_weight).to(rows.reward.dtype)
        log_likelihood = weight * rows.reward * rows.policy_terms().log_prob
        # The likelihood is no value of a policy; what is reported is the IPS estimate.
        return ObjectiveValue(-over.mean(log_likelihood), over.average(rows.weight() * rows.reward))
