"""Policy terms over a catalogue whose items lie on several workers.

u is gathered (B d numbers a worker), each worker sums over its own items, the sums of all are
merged (a few numbers a row), and in the backward pass du is summed to the rows' owners while dv
stays where its items are. What is sent in a step does not depend on the number of items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from offtower.ops import FactoredReward, PolicyTerms, partial_terms
from offtower.ops.shards import shard_gradients
from offtower.training.distributed.workers import Workers


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], workers: Workers) -> Tensor:
        ctx.counts, ctx.workers = counts, workers
        whole = workers.gather(rows, counts)
        return whole.clone() if whole is rows else whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.workers.scatter_sum(gradients[0].contiguous(), ctx.counts), None, None


def gather_rows(rows: Tensor, counts: Sequence[int], workers: Workers) -> Tensor:
    """(n_k, ...) -> (sum of n_k, ...); the gradient of a row is summed over the workers."""
    whole: Tensor = _GatheredRows.apply(rows, counts, workers)
    return whole


class _SummedRows(torch.autograd.Function):
    """Forward: the sum over workers. Backward: the gradient itself, since all workers compute the
    same loss from the same sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, workers: Workers) -> Tensor:
        total = workers.sum(rows)
        return total.clone() if total is rows else total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def sum_rows(rows: Tensor, workers: Workers) -> Tensor:
    """(B,) parts of numbers that each worker needs whole."""
    total: Tensor = _SummedRows.apply(rows, workers)
    return total


_NAMES = tuple(field.name for field in fields(PolicyTerms))


class _MergedTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        action: Tensor,
        temperature: float,
        reward: FactoredReward | None,
        entropy: bool,
        workers: Workers,
    ) -> tuple[Tensor | None, ...]:
        part = partial_terms(
            u,
            v,
            action,
            temperature=temperature,
            item_bias=bias,
            reward_model=reward,
            entropy=entropy,
        )
        sums = part.sums
        top = workers.maximum(sums.top)
        # Where all of a row's logits are -inf there is nothing to rescale by.
        base = top.masked_fill(top == float("-inf"), 0.0)
        scale = torch.exp(sums.top - base)
        here = action >= 0
        columns = [sums.total * scale, part.action_logit.masked_fill(~here, 0.0)]
        if sums.reward is not None and part.action_reward is not None:
            columns += [sums.reward * scale, part.action_reward]
        if sums.centred is not None:
            # sum exp(s - top) (s - top), moved to the common top; an empty sum has nothing to move.
            moved = (sums.top - base).clamp_min(-1e4)
            columns.append(scale * (sums.centred + sums.total * moved))
        merged = list(workers.sum(torch.stack(columns)))
        total, action_logit = merged[:2]
        log_normalizer = base + total.log()
        terms = PolicyTerms(
            log_prob=action_logit - log_normalizer,
            log_normalizer=log_normalizer,
            expected_reward=merged[2] / total if reward is not None else None,
            action_reward=merged[3] if reward is not None else None,
            entropy=total.log() - merged[-1] / total if entropy else None,
        )
        ctx.save_for_backward(u, v, bias, action, base, total, *_tensors(terms))
        ctx.temperature, ctx.reward = temperature, reward
        ctx.present = [getattr(terms, name) is not None for name in _NAMES]
        ctx.set_materialize_grads(False)
        return tuple(getattr(terms, name) for name in _NAMES)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        u, v, bias, action, base, total, *values = ctx.saved_tensors
        kept = iter(values)
        found: dict[str, Any] = {
            name: next(kept) if present else None
            for name, present in zip(_NAMES, ctx.present, strict=True)
        }
        terms = PolicyTerms(**found)
        du, dv, db = shard_gradients(
            u,
            v,
            action,
            base,
            total,
            terms,
            PolicyTerms(**dict(zip(_NAMES, gradients, strict=True))),  # type: ignore[arg-type]
            temperature=ctx.temperature,
            item_bias=bias,
            reward_model=ctx.reward,
            needs=tuple(ctx.needs_input_grad[:3]),  # type: ignore[arg-type]
        )
        return du, dv, db, None, None, None, None, None


def merged_terms(
    context_embedding: Tensor,
    item_embedding: Tensor,
    item_bias: Tensor | None,
    action: Tensor,
    workers: Workers,
    *,
    temperature: float,
    reward_model: FactoredReward | None = None,
    entropy: bool = False,
) -> PolicyTerms:
    """Terms over the items of all workers; every worker has the same rows and gets the same terms.

    Args:
        context_embedding: (B, d), all rows of the step; `gather_rows` gives them.
        item_embedding: (n_k, d), this worker's items; its bias and reward model likewise.
        action: (B,) number among this worker's items, -1 where another worker has the item.
    """
    found = _MergedTerms.apply(
        context_embedding,
        item_embedding,
        item_bias,
        action,
        temperature,
        reward_model,
        entropy,
        workers,
    )
    return PolicyTerms(**dict(zip(_NAMES, found, strict=True)))


def _tensors(terms: PolicyTerms) -> list[Tensor]:
    return [value for name in _NAMES if (value := getattr(terms, name)) is not None]
