"""Exponential smoothing of importance weights."""

from __future__ import annotations

from typing import Literal

from offtower.errors import ConfigError
from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction, share


class ExponentialSmoothing(Objective):
    r"""Maximise mean_i w_i^alpha r_i, or mean_i pi(a_i|x_i) / pscore_i^alpha r_i.

    Gradient, smoothing the weight: mean_i alpha w_i^alpha r_i grad log pi(a_i|x_i); smoothing the
    propensity: mean_i pi(a_i|x_i) / pscore_i^alpha r_i grad log pi(a_i|x_i). Both are
    differentiable everywhere, which a clip is not; alpha = 1 is IPS, smaller is more biased and
    less variable.
    Source: Korba and Portier 2022, "Adaptive importance sampling meets mirror descent" (weight);
    Aouali, Brunel, Rohde, Korba 2023, "Exponential smoothing for off-policy learning" (propensity).

    Args:
        alpha: in (0, 1].
        of: what is raised to the power.
    """

    name = "exponential_smoothing"

    def __init__(self, alpha: float = 0.7, of: Literal["weight", "pscore"] = "weight") -> None:
        self.alpha = share("alpha", alpha)
        if of not in ("weight", "pscore"):
            raise ConfigError(f"objective setting 'of' must be weight or pscore, got {of!r}")
        self.of = of

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        if self.of == "weight":
            weight = (self.alpha * rows.log_weight()).exp()
        else:
            assert rows.pscore is not None, "the trainer checks that the log has pscore"
            log_prob = rows.policy_terms().log_prob
            weight = (log_prob - self.alpha * rows.pscore.log().to(log_prob.dtype)).exp()
        contribution = weight * rows.reward
        return ObjectiveValue(-over.mean(contribution), over.average(contribution))
