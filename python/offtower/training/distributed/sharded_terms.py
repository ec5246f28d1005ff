"""Policy terms over a catalogue that is sharded over workers.

u is gathered (B d numbers per worker), each worker sums over its own items, and the sums are merged
(a few numbers per row). In the backward pass du is summed to the owners of the rows, and dv stays
with its items. Communication does not depend on the number of items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from offtower.ops import Eligibility, FactoredReward, PartialTerms, PolicyTerms, partial_terms
from offtower.ops.shards import shard_gradients
from offtower.ops.types import (
    Cotangents,
    ForwardStatistics,
    Needs,
    RunningSums,
    finite_top,
)
from offtower.training.workers import Workers


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
    whole: Tensor = _GatheredRows.apply(rows, counts, workers)  # type: ignore[no-untyped-call]
    return whole


class _SummedRows(torch.autograd.Function):
    """Sum over workers; its backward is the identity, since all workers compute the same loss from
    the same sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, workers: Workers) -> Tensor:
        total = workers.sum(rows)
        return total.clone() if total is rows else total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def sum_rows(rows: Tensor, workers: Workers) -> Tensor:
    """Sum (..., B) parts of numbers that each worker needs in full."""
    total: Tensor = _SummedRows.apply(rows, workers)  # type: ignore[no-untyped-call]
    return total


def merge_over_workers(part: PartialTerms, here: Tensor, workers: Workers) -> PartialTerms:
    """Merge the partial terms of all workers, with the same result on each; differentiable.

    The maximal logit is communicated first, then the sums relative to it in one message.

    Args:
        here: (B,) whether a row's action is one of this worker's items.
    """
    sums = part.sums
    top = finite_top(workers.maximum(sums.top.detach()))
    mine = sums.relative_to(top)
    columns = [mine.total, part.action_logit.masked_fill(~here, 0.0)]
    if mine.reward is not None and part.action_reward is not None:
        columns += [mine.reward, part.action_reward]
    if mine.centered is not None:
        columns.append(mine.centered)
    total, action_logit, *rest = sum_rows(torch.stack(columns), workers)
    reward, action_reward = rest[:2] if sums.reward is not None else (None, None)
    centered = rest[-1] if sums.centered is not None else None
    return PartialTerms(
        RunningSums(top, total, reward, centered),
        action_logit,
        None if action_reward is None else action_reward.detach(),
    )


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
        eligible: Eligibility | None,
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
            eligible=eligible,
        )
        merged = merge_over_workers(part, action >= 0, workers)
        sums, terms = merged.sums, merged.terms()
        forward = ForwardStatistics(sums.top, sums.total, terms.expected_reward, terms.entropy)
        ctx.save_for_backward(u, v, bias, action, *forward)
        ctx.temperature, ctx.reward, ctx.eligible = temperature, reward, eligible
        ctx.set_materialize_grads(False)
        return tuple(getattr(terms, name) for name in _NAMES)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        u, v, bias, action, *forward = ctx.saved_tensors
        of_term = dict(zip(_NAMES, gradients, strict=True))
        need_u, need_v, need_bias, *_ = ctx.needs_input_grad
        du, dv, db = shard_gradients(
            *(u, v, action, ForwardStatistics(*forward)),
            Cotangents(*(of_term[name] for name in Cotangents._fields)),
            temperature=ctx.temperature,
            item_bias=bias,
            reward_model=ctx.reward,
            eligible=ctx.eligible,
            needs=Needs(need_u, need_v, need_bias),
        )
        return du, dv, db, None, None, None, None, None, None


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
    eligible: Eligibility | None = None,
) -> PolicyTerms:
    """Compute terms over the items of all workers; every worker gets the same terms.

    Args:
        context_embedding: (B, d) of all rows of the step, from `gather_rows`.
        item_embedding: (n_k, d) of this worker's items; bias and reward model likewise.
        action: (B,) number among this worker's items, -1 for items of other workers.
        eligible: of this worker's items (`ItemShard.eligible`).
    """
    found = _MergedTerms.apply(  # type: ignore[no-untyped-call]
        context_embedding,
        item_embedding,
        item_bias,
        action,
        temperature,
        reward_model,
        entropy,
        eligible,
        workers,
    )
    return PolicyTerms(**dict(zip(_NAMES, found, strict=True)))
