"""What the native cores take by keyword: arrays as DLPack capsules, None where one is absent.

csrc/bindings/arguments.h defines and checks them: (B,) float32 each, unless stated otherwise.
csrc/operands.h documents what they hold.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor
from torch.utils.dlpack import to_dlpack

Capsule = object
"""A DLPack capsule, which holds its tensor's memory."""


def capsule(tensor: Tensor | None) -> Capsule | None:
    """Export a tensor without a copy; None for an absent or empty one."""
    return None if tensor is None or tensor.numel() == 0 else to_dlpack(tensor)


class PolicyArrays(TypedDict, total=False):
    """Optional arrays of a policy: `item_bias`, `reward_bias` (N,), `action` (B,) int64,
    `dense` (B, N), `reward_context` (B, e), `reward_item` (N, e)."""

    item_bias: Capsule | None
    action: Capsule | None
    dense: Capsule | None
    reward_context: Capsule | None
    reward_item: Capsule | None
    reward_bias: Capsule | None


class ForwardArrays(TypedDict, total=False):
    """Filled by the forward pass."""

    log_prob: Capsule | None
    log_normalizer: Capsule | None
    expected_reward: Capsule | None
    action_reward: Capsule | None
    entropy: Capsule | None
    anchor: Capsule | None
    total: Capsule | None
    reward_sum: Capsule | None
    centred_sum: Capsule | None
    action_logit: Capsule | None


class BackwardArrays(TypedDict, total=False):
    """Cotangents and results of the forward pass, and the gradients to be filled: `context` (B, d),
    `item` (N, d), `item_bias` (N,), in the operands' dtype."""

    expected_reward: Capsule | None
    entropy: Capsule | None
    g_log_prob: Capsule | None
    g_log_normalizer: Capsule | None
    g_expected_reward: Capsule | None
    g_entropy: Capsule | None
    context: Capsule | None
    item: Capsule | None
    item_bias: Capsule | None
