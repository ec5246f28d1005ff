"""Inverse propensity scoring: plain, clipped and self-normalized."""

from __future__ import annotations

from copy import copy
from typing import Literal

import torch

from offtower.errors import ConfigError
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
    r"""Maximize V = r_0 + sum_i w_i (r_i - r_0) / max(n, sum_i w_i) over the n rows of a step.

    r_0 is the smallest possible reward. Where the mean weight is at least 1 this is SNIPS,
    sum_i w_i r_i / sum_i w_i, which is invariant to shifts of the reward. Where it is below 1, the
    policy has mass on items that the rows do not show, which counts as r_0.
    Gradient: sum_i w_i (r_i - b) grad log pi(a_i|x_i) / max(n, sum_i w_i) with b = V or, where the
    mean weight is below 1, b = r_0.

    Plain SNIPS (`off_log: ignored`) gains by moving mass off the logged items without limit, until
    the remaining rows all have a reward. On 100 labels that ends at .05, where the log has .47 and
    `off_log: lowest` .42
    (docs/results/2026-11-30-objective-defaults.md). The sums cover all workers. V of a minibatch is
    a ratio with a bias of order 1 / effective sample size.
    Source: Swaminathan and Joachims 2015, "The self-normalized estimator for counterfactual
    learning" (NeurIPS).

    Args:
        off_log: what mass off the logged items counts as: "lowest" is r_0, "ignored" is V.

    Raises:
        ConfigError: `off_log` is neither.
    """

    name = "snips"

    def __init__(self, off_log: Literal["lowest", "ignored"] = "lowest") -> None:
        if off_log not in ("lowest", "ignored"):
            raise ConfigError(
                f"objective setting 'off_log' must be lowest or ignored, got {off_log!r}"
            )
        self.off_log = off_log
        self.lowest_reward = 0.0

    def above(self, lowest_reward: float) -> SNIPS:
        found = copy(self)
        found.lowest_reward = lowest_reward
        return found

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        weight = rows.weight()
        reward = rows.reward - self.lowest_reward
        total = reduction.total(weight).clamp_min(1e-30)
        covered = torch.ones_like(total)
        if self.off_log == "lowest":
            count = reduction.total(torch.ones_like(weight))
            covered, total = (total >= count).to(total), torch.maximum(total, count)
        value = reduction.total(weight * reward) / total
        centered = weight * (reward - covered * value)
        return ObjectiveValue(-reduction.sum(centered) / total, self.lowest_reward + value)
