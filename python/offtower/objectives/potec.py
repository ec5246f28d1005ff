"""POTEC: a first stage that learns which cluster, a second that a reward model decides."""

from __future__ import annotations

from offtower.errors import ConfigError
from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    clipped,
    positive,
)
from offtower.objectives.doubly_robust import with_constant_weight


class Potec(Objective):
    r"""DR whose correction has weights of clusters, for a policy in two stages.

    pi(a|x) = pi_1(c|x) pi_2(a|x, c) with c the item's cluster. pi_2 is frozen: a softmax over
    kappa f(x, a) inside the cluster, f the reward model's logit (POTEC takes the best item, which
    is the limit of a large kappa). So grad log pi(a|x) = grad log pi_1(c|x).
    Gradient: mean_i [ min(w_i, C) (r_i - q_i) grad log pi_1(c_i|x_i) + sum_a q(x_i,a)
    grad pi(a|x_i) ], w_i = pi_1(c_i|x_i) / pi_0(c_i|x_i), held constant. A cluster's weight is far
    smaller than an item's; what is left to bias is how wrong the reward model orders the items of
    one cluster ("local correctness"), not their level. pi_0(c|x) is estimated from the log, so no
    propensities are needed.
    Source: Saito, Yao, Joachims 2024, "POTEC: Off-policy learning for large action spaces via
    two-stage policy decomposition".

    Args:
        clusters: name of a category feature of the catalogue, or a number for k-means over the
            reward model's item embeddings (of fewer items, one each).
        sharpness: kappa, in units of the reward model's logit.
        max_weight: C.
    """

    name = "potec"
    needs_pscore = False
    needs_reward_model = True

    def __init__(
        self, clusters: int | str = 10, sharpness: float = 10.0, max_weight: float = 100.0
    ) -> None:
        if not isinstance(clusters, (int, str)) or (isinstance(clusters, int) and clusters < 2):
            raise ConfigError(
                "objective setting 'clusters' must be a category of the catalogue or a number of "
                f"two or more, got {clusters!r}"
            )
        self.clusters = clusters
        self.sharpness = positive("sharpness", sharpness)
        self.max_weight = positive("max_weight", max_weight)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        assert rows.log_cluster_weight is not None, "training weighs clusters for this objective"
        weight = clipped(rows.log_cluster_weight.exp(), self.max_weight)
        return with_constant_weight(weight, rows, over)
