"""What the cores take by keyword: addresses of arrays, 0 where one is absent.

As csrc/bindings/arguments.h defines them. (B,) float32 each, unless said otherwise; csrc/operands.h
says what they hold.
"""

from __future__ import annotations

from typing import TypedDict


class OperandAddresses(TypedDict, total=False):
    """Optional arrays of a policy: `item_bias`, `reward_bias` (N,), `action` (B,) int64,
    `dense` (B, N), `reward_context` (B, e), `reward_item` (N, e)."""

    item_bias: int
    action: int
    dense: int
    reward_context: int
    reward_item: int
    reward_bias: int


class ForwardAddresses(TypedDict, total=False):
    """To be filled by the forward pass."""

    log_prob: int
    log_normalizer: int
    expected_reward: int
    action_reward: int
    entropy: int
    anchor: int
    total: int
    reward_sum: int
    centred_sum: int
    action_logit: int


class BackwardAddresses(TypedDict, total=False):
    """Cotangents and results of the forward pass, and the gradients to be filled: `context` (B, d),
    `item` (N, d), `item_bias` (N,), in the operands' dtype."""

    expected_reward: int
    entropy: int
    g_log_prob: int
    g_log_normalizer: int
    g_expected_reward: int
    g_entropy: int
    context: int
    item: int
    item_bias: int
