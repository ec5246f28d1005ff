"""Logarithmic smoothing of importance-weighted rewards."""

from __future__ import annotations

import torch

from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction, positive


class LogSmoothing(Objective):
    r"""Maximise mean_i log(1 + lambda w_i r_i) / lambda, for rewards of zero or more.

    Gradient: mean_i w_i r_i / (1 + lambda w_i r_i) grad log pi(a_i|x_i): large weights count
    logarithmically, and the value is a pessimistic estimate of the policy's.
    Source: Sakhi, Aouali, Alquier, Chopin 2024, "Logarithmic Smoothing for Pessimistic Off-Policy
    Evaluation, Selection and Learning" (NeurIPS).
    """

    name = "log_smoothing"
    needs_nonnegative_reward = True

    def __init__(self, lambda_: float = 0.1) -> None:
        self.lambda_ = positive("lambda_", lambda_)

    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        contribution = torch.log1p(self.lambda_ * rows.weight() * rows.reward) / self.lambda_
        return ObjectiveValue(-over.mean(contribution), over.average(contribution))
