"""Regression of the reward on the two towers' inner product."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from offtower.errors import ConfigError
from offtower.objectives.base import (
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    Requirements,
)


class Regression(Objective):
    r"""Predict the reward of the logged item from s = <u, v_a> + b_a.

    Binary rewards: cross-entropy of sigmoid(s); others: squared error of s. The temperature is not
    part of the fit; the resulting policy is softmax(<u, v>/tau + b), by default with tau = .1: at 1
    it may be nearly uniform and below the logging policy, though its order of the items is right
    (docs/results/2026-11-30-objective-defaults.md). Needs neither propensities nor
    the rest of the catalogue, so a step costs O(batch), and learns nothing about items that the log
    never shows.

    Args:
        loss: `auto` is resolved from the rewards of the whole log before training.
    """

    name = "regression"
    requirements = Requirements(policy_terms=False, pscore=False, slates="rows")

    def __init__(self, loss: Literal["auto", "cross_entropy", "squared_error"] = "auto") -> None:
        if loss not in ("auto", "cross_entropy", "squared_error"):
            raise ConfigError(
                "objective setting 'loss' must be auto, cross_entropy or squared_error, "
                f"got {loss!r}"
            )
        self.loss = loss

    def for_rewards(self, *, binary: bool) -> Regression:
        if self.loss != "auto":
            return self
        return Regression("cross_entropy" if binary else "squared_error")

    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        logit = rows.scores().action_logit
        if self.loss == "auto":
            raise ConfigError(
                "regression cannot choose its loss from one batch: call for_rewards(binary=...) "
                "first, or set loss='cross_entropy' or loss='squared_error'"
            )
        if self.loss == "cross_entropy":
            per_row = functional.binary_cross_entropy_with_logits(
                logit, rows.reward, reduction="none"
            )
        else:
            per_row = torch.square(logit - rows.reward)
        return ObjectiveValue(reduction.mean(per_row), -reduction.average(per_row))
