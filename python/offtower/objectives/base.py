"""What every objective sees and returns, and the sums that span workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offtower.ops import PolicyTerms


@dataclass(frozen=True)
class LoggedRows:
    """A batch as an objective sees it: vectors of length B, one entry per logged row."""

    reward: Tensor
    """(B,) float."""
    terms: PolicyTerms | None = None
    """Terms of the policy that learns; None for objectives with `uses_policy = False`."""
    pscore: Tensor | None = None
    """(B,) pi_0(a|x), in (0, 1]; float64 where the log has it."""
    action_logit: Tensor | None = None
    """(B,) <u, v_a> + b_a of the logged item, without temperature; where `uses_policy` is False."""
    square_sum: Tensor | None = None
    """(B,) sum_a (<u, v_a> + b_a)^2 over all items; for objectives that need it."""
    divergence: Tensor | None = None
    """(B,) KL(pi(.|x) || pi_0(.|x)) to a known logging policy; for objectives that need it."""
    log_cluster_weight: Tensor | None = None
    """(B,) log of pi(c|x) / pi_0(c|x) of the logged item's cluster, no gradient; for `potec`."""

    def policy_terms(self) -> PolicyTerms:
        assert self.terms is not None, "the trainer computes terms for objectives that use them"
        return self.terms

    def log_weight(self) -> Tensor:
        """(B,) log of pi(a|x) / pscore, differentiable through log pi."""
        assert self.pscore is not None, "the trainer checks that the log has pscore"
        log_prob = self.policy_terms().log_prob
        return log_prob - self.pscore.log().to(log_prob.dtype)

    def weight(self) -> Tensor:
        """(B,) importance weight pi(a|x) / pscore, differentiable."""
        return self.log_weight().exp()

    def residual(self, trust: float = 1.0) -> Tensor:
        """(B,) reward minus `trust` times the reward model's prediction of it; no gradient."""
        action_reward = self.policy_terms().action_reward
        assert action_reward is not None, "the trainer checks that there is a reward model"
        return self.reward - trust * action_reward.detach()

    def expected_reward(self) -> Tensor:
        """(B,) sum_a pi(a|x) q(x, a), differentiable."""
        expected = self.policy_terms().expected_reward
        assert expected is not None, "the trainer checks that there is a reward model"
        return expected

    def known_divergence(self) -> Tensor:
        """(B,) KL(pi(.|x) || pi_0(.|x)) in nats, differentiable."""
        assert self.divergence is not None, "the trainer computes it where an objective needs it"
        return self.divergence

    def entropy(self) -> Tensor:
        """(B,) entropy of pi(.|x) in nats, differentiable."""
        entropy = self.policy_terms().entropy
        assert entropy is not None, "the trainer asks for entropy where an objective needs it"
        return entropy


def _local(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True)
class Reduction:
    """Sums over the rows of one step, wherever they are.

    Gradients of workers are added up, never averaged: a differentiable sum is of this worker's
    rows, a mean divides it by the rows of all, and ratio objectives get the sums in their
    denominators from all workers through `all_reduce`. So R workers give the gradient of one on
    the joined batch.
    """

    rows: int
    """Rows of the step over all workers."""
    all_reduce: Callable[[Tensor], Tensor] = _local
    """Sums a detached tensor over the workers."""

    def sum(self, per_row: Tensor) -> Tensor:
        """Differentiable: this worker's part of the sum over all rows."""
        return per_row.sum()

    def mean(self, per_row: Tensor) -> Tensor:
        """Differentiable: this worker's part of the mean over all rows."""
        return self.sum(per_row) / self.rows

    def total(self, per_row: Tensor) -> Tensor:
        """The number itself, over all workers; no gradient."""
        return self.all_reduce(per_row.detach().sum())

    def average(self, per_row: Tensor) -> Tensor:
        """The mean itself, over all workers; no gradient."""
        return self.total(per_row) / self.rows


@dataclass(frozen=True)
class ObjectiveValue:
    """What a step minimises and what it reports."""

    loss: Tensor
    """Scalar; its gradient is minus the objective's gradient."""
    value: Tensor
    """Scalar without gradient: the estimate of the policy's value over the step's rows, or, for
    regression, minus the loss. Always: larger is better."""


class Objective(ABC):
    """Per-row terms in, a loss out. One small file per family; the equation is in its docstring."""

    name: str
    uses_policy: bool = True
    """Needs log pi(a|x), so the whole catalogue's normaliser."""
    needs_pscore: bool = True
    needs_reward_model: bool = False
    needs_nonnegative_reward: bool = False
    needs_entropy: bool = False
    """Needs `terms.entropy`."""
    needs_divergence: bool = False
    """Needs `divergence`, so a stored logging policy."""
    needs_square_sum: bool = False
    """Needs the sum of all items' squared scores (with `uses_policy = False`)."""
    needs_rewarded_rows_only: bool = False
    """Rows without reward contribute nothing, and may be left out of a step."""
    proposal: str | None = None
    """A proposal of `offtower.sampling` whose draws the objective is defined by; None leaves the
    choice between exact and sampled terms to the configuration."""

    @abstractmethod
    def __call__(self, rows: LoggedRows, over: Reduction) -> ObjectiveValue:
        """The loss of a step and the value that it reports."""


def positive(name: str, value: float) -> float:
    """`value`, or a ConfigError that names the setting."""
    from offtower.errors import ConfigError

    if not (value > 0.0) or value != value or value == float("inf"):
        raise ConfigError(f"objective setting '{name}' must be a positive number, got {value!r}")
    return float(value)


def not_negative(name: str, value: float) -> float:
    """`value`, or a ConfigError that names the setting."""
    from offtower.errors import ConfigError

    if not (value >= 0.0) or value == float("inf"):
        raise ConfigError(f"objective setting '{name}' must not be negative, got {value!r}")
    return float(value)


def share(name: str, value: float) -> float:
    """`value` in (0, 1], or a ConfigError that names the setting."""
    from offtower.errors import ConfigError

    if not (0.0 < value <= 1.0):
        raise ConfigError(f"objective setting '{name}' must lie in (0, 1], got {value!r}")
    return float(value)


def clipped(weight: Tensor, max_weight: float) -> Tensor:
    return torch.clamp(weight.detach(), max=max_weight)
