"""IPS with a baseline: rewards are centred, so that the policy gains nothing by leaving the log."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from offtower.errors import ConfigError
from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction


class BaselineIPS(Objective):
    r"""Maximise mean_i w_i (r_i - b) + b, with the baseline b held constant.

    Gradient: mean_i w_i (r_i - b) grad log pi(a_i|x_i). Unbiased for every constant b, because
    E[w] = 1. With rewards of zero or more and b = 0 every logged item is pushed up, whatever it
    earned; a policy may then gain by fitting the log's items rather than their rewards ("propensity
    overfitting"). b = "mean" is the step's mean reward. b = "optimal" is the baseline of least
    variance of the value, estimated on the step's rows: sum w (w - 1) r / sum (w - 1)^2. Both are
    the numbers of one step over all workers, which biases it by the order of 1 / rows.
    Source: Joachims, Swaminathan, de Rijke 2018, "Deep learning with logged bandit feedback"
    (constant); Gupta, Jeunen, Oosterhuis, de Rijke 2024, "Optimal baseline corrections for
    off-policy contextual bandits" (optimal).

    Args:
        baseline: a number in units of reward, "mean" or "optimal".
    """

    name = "baseline_ips"

    def __init__(self, baseline: float | Literal["mean", "optimal"] = "optimal") -> None:
        if isinstance(baseline, str):
            if baseline not in ("mean", "optimal"):
                raise ConfigError(
                    "objective setting 'baseline' must be a number, mean or optimal, "
                    f"got {baseline!r}"
                )
        elif not abs(baseline) < float("inf"):
            raise ConfigError(f"objective setting 'baseline' must be finite, got {baseline!r}")
        self.baseline = baseline

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        weight = rows.weight()
        baseline = self._baseline(weight.detach(), rows.reward, over)
        centred = weight * (rows.reward - baseline)
        return ObjectiveValue(-over.mean(centred), over.average(centred) + baseline)

    def _baseline(self, weight: Tensor, reward: Tensor, over: Reduction) -> Tensor | float:
        if not isinstance(self.baseline, str):
            return self.baseline
        if self.baseline == "mean":
            return over.average(reward)
        # b = Cov(w r, w - 1) / Var(w) with the known mean 1 of w: no difference is divided by.
        beyond = weight - 1.0
        below = over.total(beyond.square())
        best = over.total(weight * beyond * reward) / below
        # A branch would wait for a GPU.
        return torch.where(below <= 0.0, over.average(reward), best)
