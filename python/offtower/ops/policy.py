"""`policy_terms`, its partial results over slices of items, and `top_k`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import cores
from offtower.ops.checks import check_action, check_embeddings, check_reward, under_autocast
from offtower.ops.cores import check_backend
from offtower.ops.eligibility_checks import (
    check_eligible_action,
    check_found,
    checked_eligibility,
)
from offtower.ops.library import policy_terms_forward
from offtower.ops.types import (
    Backend,
    Eligibility,
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
    eligible: Eligibility | None = None,
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
        eligible: the items that each row may choose; all others have a logit of -inf, in every term
            and gradient. A row with one eligible item has a log_prob of 0.
        backend: "auto", or one of `available_backends()`.

    Returns:
        Terms of length B, in float32 (float64 for float64 inputs).

    Raises:
        OperatorError: shapes, dtypes or devices do not fit, an action is out of range or not
            eligible, or a row has no eligible item (the row is named), the temperature is not
            positive and finite, or there are no items. On a GPU an action that is not eligible has
            a log_prob of NaN instead.
    """
    context_embedding, item_embedding, item_bias, reward_model = under_autocast(
        context_embedding, item_embedding, item_bias, reward_model
    )
    x = checked_operands(
        context_embedding, item_embedding, action, temperature, item_bias, reward_model
    )
    check_action(action, x.rows, x.items, x.context.device)
    x = with_eligible(x, eligible)
    check_backend(backend)
    found = policy_terms_forward(x, entropy, backend)
    has_reward = reward_model is not None
    log_prob = found.log_prob
    if x.eligible is not None and x.context.device.type != "cpu":
        # Nothing waits for the device; on the CPU the operator has raised an error.
        row = torch.arange(x.rows, dtype=torch.int64, device=action.device)
        there = x.eligible.contains(row, action.clamp(0, x.items - 1))
        log_prob = log_prob.masked_fill(~there, float("nan"))
    return PolicyTerms(
        log_prob=log_prob,
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
    eligible: Eligibility | None = None,
    backend: Backend = "auto",
) -> PartialTerms:
    """Terms of one slice of the items, without gradient.

    Args:
        item_embedding: (n, d), the slice; bias and reward model are of the slice too.
        action: (B,) number inside the slice, or -1 where the row's action lies elsewhere.
        eligible: of the slice, numbered from its first item (`Eligibility.slice_items`). A row may
            have none in it: its sums are then empty.
        others: as in `policy_terms`.
    """
    x = checked_operands(
        context_embedding, item_embedding, action, temperature, item_bias, reward_model
    )
    check_action(action.clamp_min(0), x.rows, x.items, x.context.device)
    x = with_eligible(x, eligible)
    check_eligible_action(x.eligible, action, x.items)
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
    eligible: Eligibility | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The k items of largest score s_a = <u, v_a> / temperature + b_a.

    Returns:
        scores (B, k), falling, float32 (float64 for float64 operands), and item numbers (B, k)
        int64; ties go to the lowest number. NaN counts as largest. A row with fewer than k eligible
        items ends with scores of -inf and item numbers of -1.

    Raises:
        OperatorError: as for `policy_terms`, or k is not in [1, N]. On a GPU a row without eligible
            items has -1 alone.
    """
    x = logit_operands(context_embedding, item_embedding, temperature, item_bias)
    x = with_eligible(x, eligible)
    score, index = _top_k(x, k, backend)
    if x.eligible is not None:
        check_found(index)
    return score, index


@torch.no_grad()
def slice_top_k(
    context_embedding: Tensor,
    item_embedding: Tensor,
    k: int,
    eligible: Eligibility,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `top_k` of one slice of the items, in which rows may have no eligible item."""
    x = logit_operands(context_embedding, item_embedding, temperature, item_bias)
    return _top_k(with_eligible(x, eligible), k, "auto")


def _top_k(x: Operands, k: int, backend: Backend) -> tuple[Tensor, Tensor]:
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


def with_eligible(x: Operands, eligible: Eligibility | None) -> Operands:
    """Checked operands restricted to eligible items."""
    if eligible is None:
        return x
    return replace(x, eligible=checked_eligibility(eligible, x.rows, x.items, x.context.device))
