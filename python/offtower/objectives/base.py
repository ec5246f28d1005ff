"""Interface of objectives: per-row terms in, a loss out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from offtower.errors import ConfigError
from offtower.ops import PolicyTerms
from offtower.slates import Rounds

Value = TypeVar("Value")


@dataclass(frozen=True)
class Requirements:
    """What an objective needs from the log, the policy and the training step."""

    policy_terms: bool = True
    """`LoggedRows.terms`: log pi(a|x), hence the normalizer over the catalogue. Without it the step
    passes `ItemScores` instead."""
    pscore: bool = True
    reward_model: bool = False
    nonnegative_reward: bool = False
    entropy: bool = False
    divergence: bool = False
    """The exact KL divergence from a stored reference policy."""
    square_sum: bool = False
    """The sum of squared scores over the catalogue (only without `policy_terms`)."""
    rewarded_rows_only: bool = False
    """Rows with reward 0 contribute nothing and may be left out of a step."""
    proposal: str | None = None
    """A proposal of `offtower.sampling` that defines the objective; None leaves the choice between
    exact and sampled terms to the configuration."""
    policy: Literal["two_tower", "two_stage"] = "two_tower"
    """The policy that the objective trains; `two_stage` also provides `log_cluster_weight`."""
    slates: Literal["joint", "conditional", "rows"] | None = "joint"
    """Of what log pi(a|x) is in a log of slates: the items down to a position (or the whole slate),
    the item given those above it, or a single draw. None: the objective has no form for slates."""


@dataclass(frozen=True)
class ItemScores:
    """Scores of the logged items, for objectives without `Requirements.policy_terms`."""

    action_logit: Tensor
    """(B,) <u, v_a> + b_a of the logged item, without temperature."""
    square_sum: Tensor | None = None
    """(B,) sum_a (<u, v_a> + b_a)^2, where `Requirements.square_sum` asks for it."""


@dataclass(frozen=True)
class SlateRows:
    """Of a log of slates: its rounds, which the rows hold whole."""

    rounds: Rounds
    examination: Tensor | None = None
    """(B,) factors of the rows' positions on the reward model; None for 1."""


@dataclass(frozen=True)
class EarlierPositions:
    """The items above each row in its slate, (B,) each; 0 at position 0.

    log_prob: log pi(a_1..a_{k-1}|x). log_weight: the same minus that of pi_0.
    first: whether the row is at position 0.
    """

    log_prob: Tensor
    log_weight: Tensor
    first: Tensor


@dataclass(frozen=True)
class JointPositions:
    """Of rows whose `terms.log_prob` is that of several items of a slate."""

    log_pscore: Tensor
    """(B,) float64 log of pi_0 for the same items."""
    earlier: EarlierPositions | None = None
    """Of doubly robust objectives."""


@dataclass(frozen=True)
class LoggedRows:
    """A batch as objectives see it: vectors of length B, one entry per logged row."""

    reward: Tensor
    """(B,) float."""
    terms: PolicyTerms | ItemScores
    """Of the policy in training; which of the two, `Requirements.policy_terms` says."""
    pscore: Tensor | None = None
    """(B,) pi_0(a|x) in (0, 1]; float64 where the log stores float64. Set wherever it is logged."""
    divergence: Tensor | None = None
    """(B,) KL(pi(.|x) || pi_ref(.|x)) in nats, differentiable, if `Requirements.divergence`."""
    log_cluster_weight: Tensor | None = None
    """(B,) log of pi(c|x) / pi_0(c|x) for the logged item's cluster c, without gradient, of a
    two-stage policy."""
    slates: SlateRows | None = None
    """Of a log of slates."""
    joint: JointPositions | None = None
    """Where `terms` are those of several items of a slate."""

    def policy_terms(self) -> PolicyTerms:
        assert isinstance(self.terms, PolicyTerms), "the objective does not declare policy_terms"
        return self.terms

    def scores(self) -> ItemScores:
        assert isinstance(self.terms, ItemScores), "the objective declares policy_terms"
        return self.terms

    def log_weight(self) -> Tensor:
        """(B,) log of pi(a|x) / pscore, differentiable through log pi."""
        log_prob = self.policy_terms().log_prob
        if self.joint is not None:
            return log_prob - self.joint.log_pscore
        return log_prob - provided(self.pscore, "pscore").log().to(log_prob.dtype)

    def weight(self) -> Tensor:
        """(B,) importance weight pi(a|x) / pscore, differentiable."""
        return self.log_weight().exp()

    def residual(self) -> Tensor:
        """(B,) reward minus the reward model's prediction, without gradient."""
        return self.reward - provided(self.policy_terms().action_reward, "action_reward").detach()

    def expected_reward(self) -> Tensor:
        """(B,) sum_a pi(a|x) q(x, a), differentiable.

        In a slate w_{1:k-1} E_pi[q | x, a_<k].
        """
        expected = provided(self.policy_terms().expected_reward, "expected_reward")
        earlier = None if self.joint is None else self.joint.earlier
        return expected if earlier is None else earlier.log_weight.exp() * expected

    def clipped_expected_reward(self, max_weight: float) -> tuple[Tensor, Tensor]:
        """(B,) the expected reward with a clipped constant weight of the items above, for a loss
        and as a value; without slates `expected_reward` twice."""
        expected = provided(self.policy_terms().expected_reward, "expected_reward")
        earlier = None if self.joint is None else self.joint.earlier
        if earlier is None:
            return expected, expected
        weight = clipped(earlier.log_weight.exp(), max_weight)
        # Position 0 has no items above it and a weight of 1, which is not clipped.
        weight = torch.where(earlier.first, 1.0, weight)
        chosen = expected + expected.detach() * earlier.log_prob
        return weight * chosen, weight * expected

    def inverse_propensity(self, power: float, max_weight: float) -> Tensor:
        """(B,) min(1 / pscore^power, max_weight) in the reward's dtype."""
        if self.joint is not None:
            weight = torch.exp(-power * self.joint.log_pscore).clamp(max=max_weight)
            return weight.to(self.reward.dtype)
        weight = provided(self.pscore, "pscore").pow(-power).clamp(max=max_weight)
        return weight.to(self.reward.dtype)


def provided(value: Value | None, name: str) -> Value:
    """`value`, which the training step sets for objectives that require it."""
    assert value is not None, f"the objective uses '{name}' but does not declare it"
    return value


def _local(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True)
class Reduction:
    """Sums over the rows of one step, across all workers.

    Gradients of workers are summed, not averaged: a differentiable sum covers this worker's rows, a
    mean divides it by the number of all rows, and ratio objectives get their denominators from all
    workers through `all_reduce`. R workers then give the gradient of one on the joined batch.
    """

    rows: int
    """Rows of the step over all workers; in a log of slates its rounds."""
    all_reduce: Callable[[Tensor], Tensor] = _local
    """Sums a detached tensor over the workers."""
    row_weight: Tensor | None = None
    """(B,) known weight of each row over the mean weight of the log, for down-sampled logs: sums
    are then sum_i v_i l_i, so that the mean over an epoch is self-normalized,
    sum_i v_i l_i / sum_i v_i. None where every row counts once."""

    def sum(self, per_row: Tensor) -> Tensor:
        """This worker's part of the sum over all rows; differentiable."""
        return self._weighted(per_row).sum()

    def mean(self, per_row: Tensor) -> Tensor:
        """This worker's part of the mean over all rows; differentiable."""
        return self.sum(per_row) / self.rows

    def total(self, per_row: Tensor) -> Tensor:
        """The sum over all workers, without gradient."""
        return self.all_reduce(self._weighted(per_row.detach()).sum())

    def average(self, per_row: Tensor) -> Tensor:
        """The mean over all workers, without gradient."""
        return self.total(per_row) / self.rows

    def _weighted(self, per_row: Tensor) -> Tensor:
        return per_row if self.row_weight is None else per_row * self.row_weight.to(per_row.dtype)


@dataclass(frozen=True)
class ObjectiveValue:
    """What a step minimizes and what it reports."""

    loss: Tensor
    """Scalar; its gradient is minus the objective's gradient."""
    value: Tensor
    """Scalar without gradient, larger is better: the estimated value of the policy on the step's
    rows, or minus the loss for objectives that do not estimate one."""


class Objective(ABC):
    """Turns per-row terms into a loss. Each subclass states its equation and gradient."""

    name: str
    requirements: Requirements = Requirements()

    def for_rewards(self, *, binary: bool) -> Objective:
        """Return the objective with settings that depend on whether rewards are all 0 or 1."""
        return self

    def above(self, lowest_reward: float) -> Objective:
        """Return the objective for a log whose rewards are at least `lowest_reward`."""
        return self

    @abstractmethod
    def __call__(self, rows: LoggedRows, reduction: Reduction) -> ObjectiveValue:
        """Return the loss of a step and the value to report."""


def positive(name: str, value: float) -> float:
    """Return `value`, or raise ConfigError if it is not a positive finite number."""
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"objective setting '{name}' must be a positive number, got {value!r}")
    return float(value)


def nonnegative(name: str, value: float) -> float:
    """Return `value`, or raise ConfigError if it is negative or not finite."""
    if not 0.0 <= value < float("inf"):
        raise ConfigError(f"objective setting '{name}' must not be negative, got {value!r}")
    return float(value)


def fraction(name: str, value: float) -> float:
    """Return `value`, or raise ConfigError if it lies outside (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"objective setting '{name}' must lie in (0, 1], got {value!r}")
    return float(value)


def clipped(weight: Tensor, max_weight: float) -> Tensor:
    """min(w, max_weight) without gradient."""
    return torch.clamp(weight.detach(), max=max_weight)
