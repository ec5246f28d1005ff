"""Exact draws from the softmax policy."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops.categorical import draw_categorical
from offtower.ops.policy import logit_operands
from offtower.ops.reference import MAX_LOGITS, logits, scaled_context
from offtower.ops.types import Operands


@torch.no_grad()
def sample_softmax(
    context_embedding: Tensor,
    item_embedding: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """Draw items from the softmax policy, exactly, without a (B, N) array.

    Two levels: a tile of items from the tiles' log-sum-exps, then an item inside the tile. Memory
    is O(B N / tile + B tile).

    Args:
        num_samples: s, independent draws a row.
        generator: seeds the draws.

    Returns:
        item numbers (B, s) int64 and their log-probabilities (B, s).

    Raises:
        OperatorError: as for `policy_terms`, or num_samples is below 1.
    """
    if num_samples < 1:
        raise OperatorError(f"num_samples must be at least 1, got {num_samples}")
    x = logit_operands(context_embedding, item_embedding, temperature, item_bias)
    tile = max(1, round(x.items**0.5))
    per_block = max(1, MAX_LOGITS // (x.items + tile * num_samples))
    drawn: list[tuple[Tensor, Tensor]] = []
    for start in range(0, x.rows, per_block):
        rows = slice(start, start + per_block)
        block = replace(x, context=x.context[rows], action=x.action[rows])
        drawn.append(_sample_block(block, tile, num_samples, generator))
    if not drawn:
        empty = x.action.new_empty(0, num_samples)
        return empty, empty.to(x.accumulation_dtype)
    return torch.cat([i for i, _ in drawn]), torch.cat([p for _, p in drawn])


def _sample_block(
    x: Operands, tile: int, num_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    dtype = x.accumulation_dtype
    size = max(tile, MAX_LOGITS // max(1, x.rows) // tile * tile)
    parts = []
    for start in range(0, x.items, size):
        s = logits(x, start, min(start + size, x.items))
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
    s = s.masked_fill(outside, float("-inf"))
    log_mass = (s - torch.logsumexp(s, 2, keepdim=True)).flatten(0, 1)
    drawn = draw_categorical(log_mass, 1, generator).view((*chosen.shape, 1))
    index = item.gather(2, drawn)[:, :, 0]
    return index, s.gather(2, drawn)[:, :, 0] - log_normalizer
