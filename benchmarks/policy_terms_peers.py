"""Other implementations of the terms on a CPU, for comparison with the fused operators.

Each peer is a function of (u, v, action) that computes mean log pi(a_i|x_i), with gradients if u
requires them. `attention` also computes E[v], so only its forward is comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]
CHUNKS = (1024, 4096, 16_384)


def eager(u: Tensor, v: Tensor, action: Tensor) -> Tensor:
    """Materialize the (B, N) logits."""
    return torch.log_softmax(u @ v.T, 1).gather(1, action[:, None]).mean()


def linear_cross_entropy(u: Tensor, v: Tensor, action: Tensor) -> Tensor:
    """torch's operator with default options."""
    return -F.linear_cross_entropy(u, v, action)


def linear_cross_entropy_chunked(u: Tensor, v: Tensor, action: Tensor) -> Tensor:
    """torch's operator with its chunked implementation."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(u, v, action, options=options)


def bare_product(u: Tensor, v: Tensor, action: Tensor) -> Tensor:
    """Compute only u @ v.T."""
    return u @ v.T


def attention(u: Tensor, v: Tensor, action: Tensor) -> Tensor:
    """SDPA's flash kernel with Q = u, K = V = v."""
    q, k = u[None, None], v[None, None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, k, scale=1.0).sum()


def _chunk_sums(u: Tensor, v: Tensor, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    s = u @ v.T
    s = s.float()
    new = torch.maximum(top, s.amax(1))
    return new, total * torch.exp(top - new) + torch.exp(s - new[:, None]).sum(1)


def _chunk_gradients(u: Tensor, v: Tensor, lse: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    p = (torch.exp((u @ v.T).float() - lse[:, None]) * g[:, None]).to(u.dtype)
    return p @ v, p.T @ u


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, v: Tensor, action: Tensor, chunk: int, sums: Any, gradients: Any
    ) -> Tensor:
        top = torch.full((len(u),), float("-inf"))
        total = torch.zeros(len(u))
        for start in range(0, len(v), chunk):
            top, total = sums(u, v[start : start + chunk], top, total)
        lse = top + total.log()
        ctx.save_for_backward(u, v, action, lse)
        ctx.chunk, ctx.gradients = chunk, gradients
        return ((u * v[action]).sum(1).float() - lse).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        u, v, action, lse = ctx.saved_tensors
        g = (gradients[0] / len(u)).expand(len(u))
        du = torch.zeros_like(u, dtype=torch.float32)
        dv = torch.empty_like(v)
        for start in range(0, len(v), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            du_part, dv_part = ctx.gradients(u, v[part], lse, -g)
            du += du_part
            dv[part] = dv_part
        du += g[:, None] * v[action]
        dv.index_add_(0, action, (g[:, None] * u).to(dv.dtype))
        return du.to(u.dtype), dv, None, None, None, None


def chunked(chunk: int) -> Peer:
    """Online softmax over chunks in eager torch; the backward pass recomputes the logits."""

    def run(u: Tensor, v: Tensor, action: Tensor) -> Tensor:
        return _Chunked.apply(u, v, action, chunk, _chunk_sums, _chunk_gradients)  # type: ignore[no-any-return]

    return run


def compiled(chunk: int) -> Peer:
    """`chunked` with the work of a chunk compiled by torch.compile (inductor)."""
    sums, gradients = torch.compile(_chunk_sums), torch.compile(_chunk_gradients)

    def run(u: Tensor, v: Tensor, action: Tensor) -> Tensor:
        return _Chunked.apply(u, v, action, chunk, sums, gradients)  # type: ignore[no-any-return]

    return run


def peers() -> dict[str, Peer]:
    """Return peers by name; chunked ones have several chunk sizes, of which the fastest counts."""
    found: dict[str, Peer] = {"eager": eager, "linear_cross_entropy": linear_cross_entropy}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["linear_cross_entropy, chunked"] = linear_cross_entropy_chunked
    for size in CHUNKS:
        found[f"chunked {size}"] = chunked(size)
    found["compiled 4096"] = compiled(4096)
    return found
