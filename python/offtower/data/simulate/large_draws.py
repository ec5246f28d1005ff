"""Draws from softmax policies over large catalogues, with normalizers that are exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.ops import Eligibility
from offtower.ops.eligibility import ItemMask
from offtower.ops.softmax_sampling import draw_softmax

FLOAT64_ITEMS = 10_000
"""Items up to which draws are computed in float64, in plain torch."""
_BLOCK_ROWS, _BLOCK_ITEMS = 256, 1024
"""Logits held at a time; they stay in the second-level cache."""


def draw_items(
    context: Tensor,
    item: Tensor,
    bias: Tensor,
    *,
    generator: torch.Generator,
    num_samples: int = 1,
    eligible: Eligibility | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw items of logits <context, item> + bias with replacement.

    In a large catalogue a draw is made by the native kernel in float32, whose probabilities are off
    by some 1e-7, and another pass sums the normalizers in float64.

    Args:
        context: (B, l) float64.
        item: (N, l) float64.
        bias: (N,) float64.
        generator: of the draws.
        num_samples: s.
        eligible: the items that each row may draw.

    Returns:
        items (B, s) int64, and log-normalizers (B,) float64.
    """
    listed = eligible is not None and eligible.candidates is not None
    dtype = torch.float64 if listed or len(item) <= FLOAT64_ITEMS else torch.float32
    found = draw_softmax(
        context.to(dtype),
        item.to(dtype),
        item_bias=bias.to(dtype),
        eligible=eligible,
        generator=generator,
        num_samples=num_samples,
    )
    if dtype == torch.float64:
        return found.item, found.log_normalizer
    return found.item, _log_normalizer(context, item, bias, found.log_normalizer, eligible)


def _log_normalizer(
    context: Tensor, item: Tensor, bias: Tensor, near: Tensor, eligible: Eligibility | None
) -> Tensor:
    """(B,) float64 log-normalizers, from values near them: sums relative to those need no maximum.

    Bias and `near` are columns of the product, so each logit takes a product, an exponential and an
    addition.
    """
    left = torch.cat([context, torch.ones_like(near)[:, None], -near[:, None]], 1)
    right = torch.cat([item, bias[:, None], torch.ones_like(bias)[:, None]], 1)
    total = torch.zeros_like(near)
    for first in range(0, len(left), _BLOCK_ROWS):
        rows = slice(first, min(first + _BLOCK_ROWS, len(left)))
        number = torch.arange(rows.start, rows.stop, dtype=torch.int64)
        mask = None if eligible is None else ItemMask(eligible.take(number))
        for start in range(0, len(right), _BLOCK_ITEMS):
            mass = (left[rows] @ right[start : start + _BLOCK_ITEMS].T).exp_()
            if mask is not None:
                stop = start + mass.shape[1]
                mass.masked_fill_(mask.ineligible(start, stop, len(mass)), 0.0)
            total[rows] += mass.sum(1)
    return near + total.log()
