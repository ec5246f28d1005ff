"""Exact draws from the softmax policy."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import cores
from offtower.ops.candidates import padded_blocks
from offtower.ops.categorical import draw_categorical
from offtower.ops.eligibility import WORD
from offtower.ops.eligibility_checks import check_found
from offtower.ops.policy import logit_operands, with_eligible
from offtower.ops.reference import MAX_LOGITS, Logits, scaled_context
from offtower.ops.types import Eligibility, Operands


@torch.no_grad()
def sample_softmax(
    context_embedding: Tensor,
    item_embedding: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    eligible: Eligibility | None = None,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """Draw items from the softmax policy, exactly, without a (B, N) array.

    Two levels: a tile of items from the tiles' log-sum-exps, then an item inside the tile. Memory
    is O(B N / tile + B tile). With candidate lists only their items are scored.

    Args:
        eligible: the items that each row may draw; log-probabilities are among them.
        num_samples: s, independent draws a row.
        generator: seeds the draws.

    Returns:
        item numbers (B, s) int64 and their log-probabilities (B, s).

    Raises:
        OperatorError: as for `policy_terms`, or num_samples is below 1. On a GPU a row without
            eligible items has items of -1.
    """
    if num_samples < 1:
        raise OperatorError(f"num_samples must be at least 1, got {num_samples}")
    x = logit_operands(context_embedding, item_embedding, temperature, item_bias)
    x = with_eligible(x, eligible)
    drawn: list[tuple[Tensor, Tensor]] = []
    if x.candidates is not None:
        lists, score = cores.candidate_core(x).logits(x)
        for _, s, item in padded_blocks(lists, score):
            drawn.append(_sample_lists(s, item, num_samples, generator))
    else:
        tile = max(1, round(x.items**0.5))
        if x.eligible is not None:
            tile = -(-tile // WORD) * WORD
        per_block = max(1, MAX_LOGITS // (x.items + tile * num_samples))
        for start in range(0, x.rows, per_block):
            rows = slice(start, start + per_block)
            block = replace(x, context=x.context[rows], action=x.action[rows])
            if x.eligible is not None:
                stop = min(start + per_block, x.rows)
                row = torch.arange(start, stop, dtype=torch.int64, device=x.context.device)
                block = replace(block, eligible=x.eligible.take(row))
            drawn.append(_sample_block(block, tile, num_samples, generator))
    if not drawn:
        empty = x.action.new_empty(0, num_samples)
        return empty, empty.to(x.accumulation_dtype)
    index, log_prob = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    if x.eligible is not None:
        index = index.masked_fill(log_prob.isnan(), -1)
        check_found(index)
    return index, log_prob


def _sample_lists(
    s: Tensor, item: Tensor, num_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draws from logits (B, w) of items (B, w), -inf for none."""
    log_mass = torch.log_softmax(s, 1)
    drawn = draw_categorical(log_mass, num_samples, generator)
    return item.gather(1, drawn), log_mass.gather(1, drawn)


def _sample_block(
    x: Operands, tile: int, num_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    dtype = x.accumulation_dtype
    size = max(tile, MAX_LOGITS // max(1, x.rows) // tile * tile)
    parts = []
    logits = Logits(x)
    for start in range(0, x.items, size):
        s = logits.of(start, min(start + size, x.items))
        padding = -s.shape[1] % tile
        s = torch.nn.functional.pad(s, (0, padding), value=float("-inf"))
        parts.append(torch.logsumexp(s.view(s.shape[0], -1, tile), dim=2))
    of_tile = torch.cat(parts, 1)
    log_normalizer = torch.logsumexp(of_tile, 1, keepdim=True)
    chosen = draw_categorical(of_tile - log_normalizer, num_samples, generator)
    # (B, s, tile): the items of each drawn tile; those beyond N are masked.
    inside = torch.arange(tile, dtype=torch.int64, device=chosen.device)
    item = chosen[:, :, None] * tile + inside
    outside = item >= x.items
    item = item.clamp_max(x.items - 1)
    v = x.item[item.view(x.rows, -1)].to(dtype)
    s = torch.bmm(v, scaled_context(x)[:, :, None]).view(item.shape)
    if x.item_bias is not None:
        s = s + x.item_bias[item].to(dtype)
    if x.eligible is not None:
        row = torch.arange(x.rows, dtype=torch.int64, device=item.device)[:, None, None]
        there = x.eligible.contains(row.expand_as(item).flatten(), item.flatten())
        outside = outside | ~there.view(item.shape)
    s = s.masked_fill(outside, float("-inf"))
    log_mass = (s - torch.logsumexp(s, 2, keepdim=True)).flatten(0, 1)
    drawn = draw_categorical(log_mass, 1, generator).view((*chosen.shape, 1))
    index = item.gather(2, drawn)[:, :, 0]
    return index, s.gather(2, drawn)[:, :, 0] - log_normalizer
