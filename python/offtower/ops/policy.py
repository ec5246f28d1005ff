"""`policy_terms`, its partial results over slices of items, and `top_k`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import cores
from offtower.ops.checks import check_action, check_embeddings, check_reward, under_autocast
from offtower.ops.cores import check_backend
from offtower.ops.library import policy_terms_forward
from offtower.ops.types import (
    Backend,
    Operands,
    PartialTerms,
    PolicyTerms,
    RewardOperands,
    RewardTerms,
)


def policy_terms(
    context_embedding: Tensor,
    item_embedding: Tensor,
    action: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    reward_model: RewardTerms | None = None,
    entropy: bool = False,
    backend: Backend = "auto",
) -> PolicyTerms:
    """Per-row terms of the softmax policy with logits s_a = <u, v_a> / temperature + b_a.

    No (B, N) array is held. Differentiable in both embeddings and the bias, through log_prob,
    log_normalizer, expected_reward and entropy; the reward model is frozen. bfloat16 operands are
    summed in float32, and their gradients are rounded once. The native cores (CPU and CUDA) give
    the same bits on every run, on the CPU for any number of threads too (torch.set_num_threads).
    On a GPU nothing waits for the device, so actions are not checked beforehand: one at or beyond N
    gives NaN, a negative one a log_prob of -inf. There float32 products are tf32 where torch's own
    are (`torch.set_float32_matmul_precision("high")`).

    Args:
        context_embedding: u, (B, d), float32, bfloat16 or float64.
        item_embedding: v, (N, d), of the same dtype. Under torch.autocast operands of mixed dtypes
            are brought to float32; equal ones stay as they are.
        action: (B,) int64, the logged item of each row.
        temperature: positive; fold a learned one into u and pass 1.
        item_bias: b, (N,).
        reward_model: q(x, a), for expected_reward and action_reward.
        entropy: compute the entropy too.
        backend: "auto", or one of `available_backends()`.

    Returns:
        Terms of length B, in float32 (float64 for float64 inputs).

    Raises:
        OperatorError: shapes, dtypes or devices do not fit, an action is out of range (its row is
            named), the temperature is not positive and finite, or there are no items.
    """
    context_embedding, item_embedding, item_bias, reward_model = under_autocast(
        context_embedding, item_embedding, item_bias, reward_model
    )
    x = checked_operands(
        context_embedding, item_embedding, action, temperature, item_bias, reward_model
    )
    check_action(action, x.rows, x.items, x.context.device)
    check_backend(backend)
    found = policy_terms_forward(x, entropy, backend)
    has_reward = reward_model is not None
    return PolicyTerms(
        log_prob=found.log_prob,
        log_normalizer=found.log_normalizer,
        expected_reward=found.expected_reward if has_reward else None,
        action_reward=found.action_reward.detach() if has_reward else None,
        entropy=found.entropy if entropy else None,
    )


@torch.no_grad()
def partial_terms(
    context_embedding: Tensor,
    item_embedding: Tensor,
    action: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    reward_model: RewardTerms | None = None,
    entropy: bool = False,
    backend: Backend = "auto",
) -> PartialTerms:
    """Terms of one slice of the items, without gradient.

    Args:
        item_embedding: (n, d), the slice; bias and reward model are of the slice too.
        action: (B,) number inside the slice, or -1 where the row's action lies elsewhere.
        others: as in `policy_terms`.
    """
    x = checked_operands(
        context_embedding, item_embedding, action, temperature, item_bias, reward_model
    )
    check_action(action.clamp_min(0), x.rows, x.items, x.context.device)
    check_backend(backend)
    return cores.choose_core(backend, x).partial(x, entropy)


def merge_partials(parts: Sequence[PartialTerms]) -> PartialTerms:
    """All slices in one."""
    if not parts:
        raise OperatorError("there are no partial results to merge")
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return merged


@torch.no_grad()
def top_k(
    context_embedding: Tensor,
    item_embedding: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The k items of largest score s_a = <u, v_a> / temperature + b_a.

    Returns:
        scores (B, k), falling, float32 (float64 for float64 operands), and item numbers (B, k)
        int64; ties go to the lowest number. NaN counts as largest.

    Raises:
        OperatorError: as for `policy_terms`, or k is not in [1, N].
    """
    x = logit_operands(context_embedding, item_embedding, temperature, item_bias)
    if not 1 <= k <= x.items:
        raise OperatorError(f"k must lie in [1, {x.items}], the number of items, got {k}")
    check_backend(backend)
    return cores.choose_core(backend, x, k).top_k(x, k)


def checked_operands(
    context_embedding: Tensor,
    item_embedding: Tensor,
    action: Tensor,
    temperature: float,
    item_bias: Tensor | None,
    reward_model: RewardTerms | None,
) -> Operands:
    """Operands whose shapes, dtypes and devices fit; the action is not checked."""
    check_embeddings(context_embedding, item_embedding, temperature, item_bias)
    if reward_model is not None:
        rows, items = context_embedding.shape[0], item_embedding.shape[0]
        check_reward(reward_model, rows, items, context_embedding)
    return Operands(
        context_embedding,
        item_embedding,
        action,
        float(temperature),
        item_bias,
        RewardOperands.of(reward_model),
    )


def logit_operands(
    context_embedding: Tensor, item_embedding: Tensor, temperature: float, item_bias: Tensor | None
) -> Operands:
    """Checked operands without logged actions and reward model."""
    check_embeddings(context_embedding, item_embedding, temperature, item_bias)
    action = context_embedding.new_zeros(context_embedding.shape[0], dtype=torch.int64)
    return Operands(context_embedding, item_embedding, action, float(temperature), item_bias)
