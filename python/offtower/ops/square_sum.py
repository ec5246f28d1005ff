"""Sums of squared scores over the catalogue, from the items' Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def square_sum(
    context_embedding: Tensor, item_embedding: Tensor, item_bias: Tensor | None = None
) -> Tensor:
    """(B,) sum over all N items of (<u, v_a> + b_a)^2, in O(N d^2 + B d^2) and no (B, N) array.

    The items enter through V^T V, V^T b and b^T b only. Differentiable in all arguments; sums are
    float32, or float64 for float64 embeddings.

    Args:
        context_embedding: (B, d). item_embedding: (N, d). item_bias: (N,).
    """
    wide = torch.promote_types(context_embedding.dtype, torch.float32)
    u, v = context_embedding.to(wide), item_embedding.to(wide)
    if item_bias is not None:
        # The bias becomes the last coordinate of an item, 1 that of every context.
        u = torch.cat([u, u.new_ones(len(u), 1)], dim=1)
        v = torch.cat([v, item_bias.to(wide).unsqueeze(1)], dim=1)
    return ((u @ (v.T @ v)) * u).sum(dim=1)
