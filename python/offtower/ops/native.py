"""The CPU core's calls: tensors in, DLPack capsules out, results as tensors.

Everything here assumes operands that `checks` has passed and that `backends.core_of` has accepted:
float32 or bfloat16, on the CPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from offtower.ops.arrays import Capsule, capsule
from offtower.ops.reference import Cotangents, Inputs, RunningSums

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_WORTH_A_THREAD = 1 << 22
"""Multiply-adds, some 50 microseconds of one thread."""
_EXPONENTIAL = 16
"""What an exponential costs, in multiply-adds."""


class Terms(NamedTuple):
    """What the forward pass gives, each (B,) float32; absent ones are empty."""

    log_prob: Tensor
    log_normalizer: Tensor
    expected_reward: Tensor
    action_reward: Tensor
    entropy: Tensor
    anchor: Tensor
    total: Tensor


class Operands:
    """A core's own operands, from contiguous tensors.

    Args:
        make: their constructor in the core's module.
        aligned: copy a tensor that does not start on 16 bytes.
        tfloat32: round the products of float32 operands to tf32.
    """

    def __init__(
        self,
        x: Inputs,
        make: Callable[..., Any],
        *,
        aligned: bool = False,
        tfloat32: bool = False,
    ) -> None:
        self._aligned = aligned
        self.native = make(
            context=self.capsule(x.u),
            item=self.capsule(x.v),
            item_bias=self.capsule(x.bias),
            action=self.capsule(x.action),
            temperature=x.temperature,
            dense=self.capsule(x.dense),
            reward_context=self.capsule(x.e),
            reward_item=self.capsule(x.t),
            reward_bias=self.capsule(x.c),
            sigmoid=x.sigmoid,
            tfloat32=tfloat32,
        )

    def capsule(self, tensor: Tensor | None) -> Capsule | None:
        """Export a tensor, or a contiguous and aligned copy."""
        if tensor is None:
            return None
        plain = tensor.detach().contiguous()
        if self._aligned and plain.data_ptr() % 16 != 0:
            plain = plain.clone()
        return to_dlpack(plain)


def _setting(x: Inputs) -> dict[str, Any]:
    """Threads as torch is set, but none for less than it costs to wake one; the instruction set
    only where one is forced. Neither changes a result's bits, save the set."""
    width = x.u.shape[1] + (0 if x.e is None else x.e.shape[1]) + _EXPONENTIAL
    worth = x.u.shape[0] * x.v.shape[0] * width // _WORTH_A_THREAD
    return {
        "threads": max(1, min(torch.get_num_threads(), worth)),
        "isa": os.environ.get("OFFTOWER_CPU_ISA", ""),
    }


def forward(x: Inputs, entropy: bool) -> Terms:
    """All terms over all items of `x`."""
    from offtower.ops import _cpu

    operands = Operands(x, _cpu.Operands)
    rows, reward = x.u.shape[0], x.u.shape[0] if x.has_reward else 0
    make = functools.partial(torch.empty, dtype=torch.float32, device=x.u.device)
    terms = Terms(
        make(rows), make(rows), make(reward), make(reward), make(rows if entropy else 0),
        make(rows), make(rows),
    )  # fmt: skip
    arrays: dict[str, Any] = {name: capsule(tensor) for name, tensor in terms._asdict().items()}
    _cpu.forward(operands.native, **arrays, **_setting(x))
    return terms


def running_sums(x: Inputs, entropy: bool) -> tuple[RunningSums, Tensor, Tensor | None]:
    """Sums over the items of `x`, logits (-inf) and rewards (0) of actions (-1 if elsewhere)."""
    from offtower.ops import _cpu

    operands = Operands(x, _cpu.Operands)
    make = functools.partial(torch.empty, x.u.shape[0], dtype=torch.float32, device=x.u.device)
    top, total, logit = make(), make(), make()
    reward = make() if x.has_reward else None
    action_reward = make() if x.has_reward else None
    centred = make() if entropy else None
    _cpu.forward(
        operands.native,
        anchor=capsule(top),
        total=capsule(total),
        reward_sum=capsule(reward),
        centred_sum=capsule(centred),
        action_logit=capsule(logit),
        action_reward=capsule(action_reward),
        **_setting(x),
    )
    return RunningSums(top, total, reward, centred), logit, action_reward


def backward(
    x: Inputs,
    sums: tuple[Tensor, Tensor],
    expected_reward: Tensor,
    entropy: Tensor,
    g: Cotangents,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in u, v and bias; only those that `needs` names are computed."""
    from offtower.ops import _cpu

    operands = Operands(x, _cpu.Operands)
    need_u, need_v, need_b = needs
    du = torch.empty_like(x.u, memory_format=torch.contiguous_format) if need_u else None
    dv = torch.empty_like(x.v, memory_format=torch.contiguous_format) if need_v else None
    db = x.u.new_empty(x.v.shape[0]) if need_b and x.bias is not None else None
    anchor, total = sums
    given: dict[str, Tensor | None] = {
        "g_log_prob": g.log_prob,
        "g_log_normalizer": g.log_normalizer,
        "g_expected_reward": g.expected_reward,
        "g_entropy": g.entropy,
        "anchor": anchor,
        "total": total,
        "expected_reward": expected_reward,
        "entropy": entropy,
    }
    arrays: dict[str, Any] = {
        name: operands.capsule(as_float32(tensor)) for name, tensor in given.items()
    }
    _cpu.backward(
        operands.native,
        **arrays,
        context=capsule(du),
        item=capsule(dv),
        item_bias=capsule(db),
        **_setting(x),
    )
    return du, dv, db


def top_k(x: Inputs, k: int) -> tuple[Tensor, Tensor]:
    """Scores (B, k) float32, falling, and item numbers (B, k); of equal scores the lowest first."""
    from offtower.ops import _cpu

    operands = Operands(x, _cpu.Operands)
    score = torch.empty(x.u.shape[0], k, dtype=torch.float32, device=x.u.device)
    index = torch.empty(x.u.shape[0], k, dtype=torch.int64, device=x.u.device)
    _cpu.top_k(operands.native, k=k, score=to_dlpack(score), index=to_dlpack(index), **_setting(x))
    return score, index


def as_float32(tensor: Tensor | None) -> Tensor | None:
    """In float32; None for an absent or empty tensor."""
    return None if tensor is None or tensor.numel() == 0 else tensor.float()
