"""Other implementations of the terms on a GPU, for comparison with gpu_policy_terms.py.

`peers_of` returns a factory per "case: peer"; the factory raises if the peer is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FORWARD, BACKWARD = "log_prob forward", "log_prob forward+backward"
EXPECTED, DR = "+ expected_reward forward", "DR identity forward+backward"
CHUNK = 65_536
HEADS = 64  # attention over blocks of items, which fills the device where one head would not
NAMES = (
    f"{EXPECTED}: SDPA flash",
    f"{EXPECTED}: SDPA cuDNN",
    f"{BACKWARD}: chunked torch",
    f"{BACKWARD}: eager torch",
    f"{BACKWARD}: cce_exact",
    f"{BACKWARD}: cce (default, drops small tiles)",
    f"{BACKWARD}: Liger",
    f"{FORWARD}: chunked torch",
    f"{DR}: eager torch",
    f"{BACKWARD}: F.linear_cross_entropy",
    f"{BACKWARD}: torch.compile",
)
"""Cases and peers in the order to run them."""


def eager(u: Tensor, v: Tensor, action: Tensor) -> Tensor:
    return torch.log_softmax((u @ v.T).float(), 1).gather(1, action[:, None])[:, 0].mean()


def eager_dr(u: Tensor, v: Tensor, action: Tensor, e: Tensor, t: Tensor) -> Tensor:
    log_pi = torch.log_softmax((u @ v.T).float(), 1)
    return (log_pi.gather(1, action[:, None])[:, 0] + (log_pi.exp() * (e @ t.T)).sum(1)).mean()


class _Chunked(torch.autograd.Function):
    """log_prob by chunks of items; the backward pass recomputes the logits."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, action: Tensor) -> Tensor:
        parts = [(u @ block.T).float().logsumexp(1) for block in v.split(CHUNK)]
        lse = torch.stack(parts).logsumexp(0)
        ctx.save_for_backward(u, v, action, lse)
        return (u.float() * v[action].float()).sum(1) - lse

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        u, v, action, lse = ctx.saved_tensors
        du, dv = torch.zeros_like(u, dtype=torch.float32), torch.empty_like(v)
        for start in range(0, len(v), CHUNK):
            block = v[start : start + CHUNK]
            ds = ((u @ block.T).float() - lse[:, None]).exp().mul_(-g[:, None]).to(u.dtype)
            du += ds @ block
            dv[start : start + CHUNK] = ds.T @ u
        du.addcmul_(g[:, None], v[action].float())
        dv.index_add_(0, action, (g[:, None] * u).to(v.dtype))
        return du.to(u.dtype), dv, None


def peers_of(x: Any) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Return call factories for operands `x`: u (B, d), v (N, d), e, t, action."""
    u, v = x.u, x.v

    def room(arrays: int) -> None:
        if not u.is_cuda:
            return
        need = arrays * len(u) * len(v) * 4
        free = torch.cuda.mem_get_info()[0]
        if need > free:
            raise MemoryError(f"needs about {need >> 30} GiB and {free >> 30} are free")

    def gradients(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), (u, v))

    def without_gradient(call: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(call)

    def make_eager() -> Callable[[], Any]:
        room(4)
        return gradients(lambda: eager(u, v, x.action))

    def make_eager_dr() -> Callable[[], Any]:
        room(6)
        return gradients(lambda: eager_dr(u, v, x.action, x.e, x.t))

    def make_compiled() -> Callable[[], Any]:
        room(3)
        compiled = torch.compile(eager)
        return gradients(lambda: compiled(u, v, x.action))

    def make_chunked() -> Callable[[], Any]:
        return gradients(lambda: _Chunked.apply(u, v, x.action).mean())

    def make_chunked_forward() -> Callable[[], Any]:
        return without_gradient(lambda: _Chunked.apply(u, v, x.action))

    def attention(operator: str) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            # (batch, heads, length, d): each head attends to a block of the items.
            heads = HEADS if len(v) % HEADS == 0 else 1
            q = u.detach().expand(1, heads, *u.shape).contiguous()
            k, t = (z.detach().view(1, heads, -1, z.shape[1]) for z in (v, x.t))

            def call() -> Tensor:
                if operator == "flash":
                    flash = torch.ops.aten._scaled_dot_product_flash_attention
                    means, log_sums = flash(q, k, t, 0.0, False, scale=1.0)[:2]
                else:
                    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
                    means, log_sums = cudnn(q, k, t, None, True, 0.0, False, scale=1.0)[:2]
                shares = log_sums.reshape(heads, -1).softmax(0)
                return torch.einsum("hb,hbd->bd", shares, means[0].float())

            return without_gradient(call)

        return make

    def cut_cross_entropy(implementation: str) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            from cut_cross_entropy import linear_cross_entropy

            return gradients(lambda: linear_cross_entropy(u, v, x.action, impl=implementation))

        return make

    def make_liger() -> Callable[[], Any]:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        return gradients(lambda: LigerFusedLinearCrossEntropyFunction.apply(u, v, x.action)[0])

    def make_linear_cross_entropy() -> Callable[[], Any]:
        call = F.linear_cross_entropy  # type: ignore[attr-defined]
        return gradients(lambda: call(u, v, x.action))

    makers = (
        attention("flash"),
        attention("cudnn"),
        make_chunked,
        make_eager,
        cut_cross_entropy("cce_exact"),
        cut_cross_entropy("cce"),
        make_liger,
        make_chunked_forward,
        make_eager_dr,
        make_linear_cross_entropy,
        make_compiled,
    )
    return dict(zip(NAMES, makers, strict=True))
