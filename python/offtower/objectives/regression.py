"""Regression of the reward on the two towers' inner product."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from offtower.errors import ConfigError
from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction


class Regression(Objective):
    r"""Predict the reward of the logged item from s = <u, v_a> + b_a.

    Binary rewards: cross-entropy of sigmoid(s); others: squared error of s. The temperature plays
    no part in fitting; the policy that comes out is softmax(<u, v>/tau + b). Needs neither
    propensities nor the rest of the catalogue, so a step costs O(batch), and says nothing about
    items that the log never shows.
    """

    name = "regression"
    uses_policy = False
    needs_pscore = False

    def __init__(self, loss: Literal["auto", "cross_entropy", "squared_error"] = "auto") -> None:
        if loss not in ("auto", "cross_entropy", "squared_error"):
            raise ConfigError(
                "objective setting 'loss' must be auto, cross_entropy or squared_error, "
                f"got {loss!r}"
            )
        self.loss = loss
        """`auto` is resolved by the trainer, from the rewards of the whole log."""

    def resolve(self, binary_reward: bool) -> Regression:
        if self.loss != "auto":
            return self
        return Regression("cross_entropy" if binary_reward else "squared_error")

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        assert rows.action_logit is not None
        if self.loss == "auto":
            raise ConfigError(
                "regression does not know whether rewards are binary: "
                "call resolve(binary_reward) or state loss='cross_entropy' or 'squared_error'"
            )
        if self.loss == "cross_entropy":
            per_row = functional.binary_cross_entropy_with_logits(
                rows.action_logit, rows.reward, reduction="none"
            )
        else:
            per_row = torch.square(rows.action_logit - rows.reward)
        return ObjectiveValue(over.mean(per_row), -over.average(per_row))
