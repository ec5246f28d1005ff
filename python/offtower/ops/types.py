"""What goes into the operators beside tensors, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Link = Literal["identity", "sigmoid"]
Backend = Literal["auto", "reference", "cpu", "cuda"]


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
