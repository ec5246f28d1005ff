"""What the operators take and return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops.eligibility import Eligibility as Eligibility
from offtower.ops.eligibility import ItemLists as ItemLists

Link = Literal["identity", "sigmoid"]
Backend = Literal["auto", "reference", "cpu", "cuda"]

LOG_PROB_FLOOR = -1e4
"""Log-probabilities are clamped here in p log p, where 0 * -inf would be NaN. Its exponential is 0
in float32 and float64."""


@dataclass(frozen=True)
class PolicyTerms:
    """Per-row terms of a softmax policy over N items, each (B,); None where not asked for."""

    log_prob: Tensor
    """log pi(a_i|x_i)."""
    log_normalizer: Tensor
    """log sum_a exp s_a."""
    expected_reward: Tensor | None
    """sum_a pi(a|x_i) q(x_i, a); differentiable in the policy, not in the reward model."""
    action_reward: Tensor | None
    """q(x_i, a_i); no gradient."""
    entropy: Tensor | None
    """-sum_a pi(a|x_i) log pi(a|x_i), in nats."""


@dataclass(frozen=True)
class DenseReward:
    """q(x_i, a) as an array, for small catalogues. Frozen: no gradient flows into it."""

    values: Tensor
    """(B, N)."""


@dataclass(frozen=True)
class FactoredReward:
    """q(x_i, a) = link(<e_i, t_a> + c_a). Frozen: no gradient flows into it."""

    context: Tensor
    """(B, e)."""
    item: Tensor
    """(N, e)."""
    item_bias: Tensor | None = None
    """(N,)."""
    link: Link = "identity"


RewardTerms = DenseReward | FactoredReward


def reward_in(reward: RewardTerms, dtype: torch.dtype) -> RewardTerms:
    """A reward model's parts in the dtype that operators need, that of the embeddings."""
    if isinstance(reward, DenseReward):
        return DenseReward(reward.values.to(dtype))
    bias = reward.item_bias
    return FactoredReward(
        reward.context.to(dtype),
        reward.item.to(dtype),
        None if bias is None else bias.to(dtype),
        reward.link,
    )


@dataclass(frozen=True)
class RewardOperands:
    """A reward model's tensors: `dense`, or `context` and `item`."""

    dense: Tensor | None = None
    """(B, N)."""
    context: Tensor | None = None
    """(B, e)."""
    item: Tensor | None = None
    """(N, e)."""
    item_bias: Tensor | None = None
    """(N,)."""
    sigmoid: bool = False

    @classmethod
    def of(cls, reward_model: RewardTerms | None) -> RewardOperands | None:
        """The detached tensors of a reward model."""
        if reward_model is None:
            return None
        if isinstance(reward_model, DenseReward):
            return cls(dense=reward_model.values.detach())
        bias = reward_model.item_bias
        return cls(
            context=reward_model.context.detach(),
            item=reward_model.item.detach(),
            item_bias=None if bias is None else bias.detach(),
            sigmoid=reward_model.link == "sigmoid",
        )


@dataclass(frozen=True)
class Operands:
    """A policy's logits s_a = <u, v_a> / temperature + b_a, logged actions and a reward model."""

    context: Tensor
    """u, (B, d)."""
    item: Tensor
    """v, (N, d)."""
    action: Tensor
    """(B,) int64; -1 where the row's action is not among the items."""
    temperature: float = 1.0
    item_bias: Tensor | None = None
    """b, (N,)."""
    reward: RewardOperands | None = None
    eligible: Eligibility | None = None
    """s_a = -inf for other items; with `candidates`, lists alone (`Eligibility.resolved`)."""

    @property
    def candidates(self) -> ItemLists | None:
        return None if self.eligible is None else self.eligible.candidates

    @property
    def rows(self) -> int:
        return self.context.shape[0]

    @property
    def items(self) -> int:
        return self.item.shape[0]

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """Of sums and results: float32, or float64 for float64 operands."""
        return torch.float64 if self.context.dtype == torch.float64 else torch.float32

    def map(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """The same operands with every tensor changed."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        reward = self.reward
        if reward is not None:
            reward = RewardOperands(
                changed(reward.dense),
                changed(reward.context),
                changed(reward.item),
                changed(reward.item_bias),
                reward.sigmoid,
            )
        return Operands(
            change(self.context),
            change(self.item),
            change(self.action),
            self.temperature,
            changed(self.item_bias),
            reward,
            None if self.eligible is None else self.eligible.map(change),
        )


class ForwardResults(NamedTuple):
    """What a forward pass computes, each (B,); empty where not asked for.

    `reference_max`, a number near each row's largest logit, and `total`, the sum of
    exp(s - reference_max), are for the backward pass: the log-normalizer alone, near 14 at a
    million items, would put its rounding error on every probability.
    """

    log_prob: Tensor
    log_normalizer: Tensor
    expected_reward: Tensor
    action_reward: Tensor
    entropy: Tensor
    reference_max: Tensor
    total: Tensor


class ForwardStatistics(NamedTuple):
    """Results of the forward pass that the backward pass reads, over all items of the policy."""

    reference_max: Tensor
    total: Tensor
    expected_reward: Tensor | None
    """Read where it has a cotangent; so is the entropy."""
    entropy: Tensor | None


class Cotangents(NamedTuple):
    """Gradients of the loss in each result, (B,); None where a result was not used."""

    log_prob: Tensor | None
    log_normalizer: Tensor | None
    expected_reward: Tensor | None
    entropy: Tensor | None


class Needs(NamedTuple):
    """Which gradients a backward pass computes."""

    context: bool
    item: bool
    item_bias: bool


class Gradients(NamedTuple):
    """In the operands' shapes and dtype; None where not needed."""

    context: Tensor | None
    item: Tensor | None
    item_bias: Tensor | None


@dataclass(frozen=True)
class RunningSums:
    """Sums over a slice of items, relative to the slice's largest logit; they merge exactly."""

    top: Tensor
    """(B,) max_a s_a."""
    total: Tensor
    """(B,) sum exp(s - top)."""
    reward: Tensor | None
    """(B,) sum exp(s - top) q."""
    centered: Tensor | None
    """(B,) sum exp(s - top) (s - top), for the entropy without cancellation."""

    def relative_to(self, reference: Tensor) -> RunningSums:
        """The sums of exp(s - reference) and (s - reference); differentiable, also in `top`."""
        scale = torch.exp(self.top - reference)
        # An empty sum has nothing to move: -inf times 0 would be NaN.
        moved = (self.top - reference).clamp_min(LOG_PROB_FLOOR)
        return RunningSums(
            reference,
            self.total * scale,
            None if self.reward is None else self.reward * scale,
            None if self.centered is None else scale * (self.centered + self.total * moved),
        )

    def merge(self, other: RunningSums) -> RunningSums:
        # Sums do not depend on what they are relative to, so no gradient goes through it.
        top = torch.maximum(self.top, other.top).detach()
        base = finite_top(top)
        mine, others = self.relative_to(base), other.relative_to(base)
        return RunningSums(
            top,
            mine.total + others.total,
            _added(mine.reward, others.reward),
            _added(mine.centered, others.centered),
        )

    @property
    def log_normalizer(self) -> Tensor:
        return self.top + self.total.log()

    @property
    def expected_reward(self) -> Tensor | None:
        return None if self.reward is None else self.reward / self.total

    @property
    def entropy(self) -> Tensor | None:
        return None if self.centered is None else self.total.log() - self.centered / self.total


@dataclass(frozen=True)
class PartialTerms:
    """What one slice of the items contributes; slices merge exactly, in any order."""

    sums: RunningSums
    action_logit: Tensor
    """(B,); -inf where the row's action is not in the slice."""
    action_reward: Tensor | None
    """(B,); 0 where the row's action is not in the slice."""

    def map(self, change: Callable[[Tensor], Tensor]) -> PartialTerms:
        """The same terms with every tensor changed."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        sums = self.sums
        return PartialTerms(
            RunningSums(
                change(sums.top), change(sums.total), changed(sums.reward), changed(sums.centered)
            ),
            change(self.action_logit),
            changed(self.action_reward),
        )

    def merge(self, other: PartialTerms) -> PartialTerms:
        return PartialTerms(
            self.sums.merge(other.sums),
            torch.maximum(self.action_logit, other.action_logit),
            _added(self.action_reward, other.action_reward),
        )

    def finish(self) -> PolicyTerms:
        """Terms of the policy over all merged slices.

        Raises:
            OperatorError: a row's action was in none of them.
        """
        if bool(torch.isinf(self.action_logit).any()):
            row = int(torch.isinf(self.action_logit).nonzero()[0])
            raise OperatorError(
                f"the action of row {row} is in none of the merged slices, or not eligible"
            )
        return self.terms()

    def terms(self) -> PolicyTerms:
        """As `finish`, but values are not looked at: for callers that have merged all slices."""
        log_normalizer = self.sums.log_normalizer
        return PolicyTerms(
            log_prob=self.action_logit - log_normalizer,
            log_normalizer=log_normalizer,
            expected_reward=self.sums.expected_reward,
            action_reward=self.action_reward,
            entropy=self.sums.entropy,
        )


def finite_top(top: Tensor) -> Tensor:
    """0 where every item so far is masked: then there is nothing to rescale by."""
    return top.masked_fill(top == float("-inf"), 0.0)


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other
