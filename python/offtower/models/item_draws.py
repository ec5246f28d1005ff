"""A policy's terms and items drawn from it, in one pass over the catalogue.

An expected reward m = sum_a pi(a|x) q(x, a) may be replaced by the mean of q over S items drawn
from pi(.|x). That is unbiased in every row, so every estimator that is a mean of rows stays as
unbiased as it was; the draws' noise is independent between rows, so every standard error and
interval contains it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from offtower.models.items import ItemEmbeddings
from offtower.ops import (
    DenseReward,
    FactoredReward,
    PartialTerms,
    PolicyTerms,
    partial_terms,
)
from offtower.ops.categorical import draw_categorical
from offtower.ops.types import RewardTerms


@torch.no_grad()
def terms_and_draws(
    context_embedding: Tensor,
    items: ItemEmbeddings,
    action: Tensor,
    *,
    draws: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    reward_model: RewardTerms | None = None,
    slice_items: int | None = None,
) -> tuple[PolicyTerms, Tensor]:
    """The terms of `ops.policy_terms`, and S items a row drawn from the policy with replacement.

    The catalogue is taken in slices, so that one pass gives the terms and each slice's probability;
    an item is drawn by drawing a slice, then an item inside it. Exact: no proposal, no rejection.
    Memory: rows x (number of slices).

    Args:
        context_embedding: (B, d). items: N of them. action: (B,) logged items.
        draws: S. generator: of the draws.
        slice_items: items of a slice; about sqrt(N) by default.

    Returns:
        terms of length B, and item numbers (B, S) int64.
    """
    n_items = items.embedding.shape[0]
    size = slice_items or max(64, round(math.sqrt(n_items)))
    starts = range(0, n_items, size)
    merged: PartialTerms | None = None
    mass = context_embedding.new_empty(context_embedding.shape[0], len(starts), dtype=torch.float64)
    for k, start in enumerate(starts):
        stop = min(start + size, n_items)
        here = (action >= start) & (action < stop)
        part = partial_terms(
            context_embedding,
            items.embedding[start:stop],
            torch.where(here, action - start, -1),
            temperature=temperature,
            item_bias=None if items.bias is None else items.bias[start:stop],
            reward_model=None if reward_model is None else _sliced(reward_model, start, stop),
        )
        mass[:, k] = part.sums.log_normalizer.double()
        merged = part if merged is None else merged.merge(part)
    assert merged is not None, "a catalogue has at least one item"
    chosen = _draw(mass, draws, generator)
    drawn = _inside(context_embedding, items, temperature, mass, chosen, size, generator)
    return merged.finish(), drawn


def rewards_at(reward: FactoredReward | DenseReward, item: Tensor) -> Tensor:
    """q(x_i, a) at items (B, S): (B, S)."""
    if isinstance(reward, DenseReward):
        return reward.values.gather(1, item)
    value = torch.einsum("be,bse->bs", reward.context, reward.item[item])
    if reward.item_bias is not None:
        value = value + reward.item_bias[item]
    return torch.sigmoid(value) if reward.link == "sigmoid" else value


def reward_of_rows(reward: RewardTerms, row: Tensor) -> RewardTerms:
    """A reward model of some rows, (n,) int64."""
    if isinstance(reward, DenseReward):
        return DenseReward(reward.values[row])
    return replace(reward, context=reward.context[row])


def logits_at(context: Tensor, items: ItemEmbeddings, item: Tensor, temperature: float) -> Tensor:
    """(m, S) logits of the items (m, S), computed in float64, a block of rows at a time."""
    out = torch.empty_like(item, dtype=torch.float64)
    step = max(1, (1 << 22) // max(1, item.shape[1] * context.shape[1]))
    for start in range(0, len(item), step):
        part = slice(start, start + step)
        vectors = items.embedding[item[part]].double()
        logit = torch.einsum("bd,bsd->bs", context[part].double(), vectors) / temperature
        if items.bias is not None:
            logit = logit + items.bias[item[part]].double()
        out[part] = logit
    return out


def _sliced(reward: RewardTerms, start: int, stop: int) -> RewardTerms:
    if isinstance(reward, DenseReward):
        return DenseReward(reward.values[:, start:stop].contiguous())
    bias = reward.item_bias
    return FactoredReward(
        reward.context,
        reward.item[start:stop],
        None if bias is None else bias[start:stop],
        link=reward.link,
    )


def _inside(
    context_embedding: Tensor,
    items: ItemEmbeddings,
    temperature: float,
    mass: Tensor,
    chosen: Tensor,
    size: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw an item of each chosen slice; rows that chose the same slice are scored together."""
    rows, draws = chosen.shape
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=mass.shape[1]).tolist()
    drawn = torch.empty_like(flat)
    at = 0
    for k, count in enumerate(counts):
        if count == 0:
            continue
        place = order[at : at + count]
        at += count
        row = place // draws
        tile = slice(k * size, min((k + 1) * size, items.embedding.shape[0]))
        logit = (context_embedding[row] @ items.embedding[tile].T).double() / temperature
        if items.bias is not None:
            logit += items.bias[tile].double()
        drawn[place] = tile.start + _draw(logit, 1, generator)[:, 0]
    return drawn.view(rows, draws)


def _draw(log_mass: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(n, S) draws from unnormalized log masses (n, K) of any size."""
    return draw_categorical(log_mass - log_mass.amax(dim=1, keepdim=True), draws, generator)
