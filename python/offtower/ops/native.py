"""The CPU core's calls: tensors in, addresses out, results as tensors.

Everything here assumes operands that `checks` has passed and that `backends.core_of` has accepted:
float32 or bfloat16, on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offtower.ops.reference import Cotangents, Inputs, RunningSums

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
NONE, DENSE, IDENTITY, SIGMOID = range(4)
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


def reward_kind(x: Inputs) -> int:
    """The core's number of the reward model's kind."""
    if x.dense is not None:
        return DENSE
    if x.e is None:
        return NONE
    return SIGMOID if x.sigmoid else IDENTITY


class Operands:
    """Contiguous tensors, kept alive, and a core's own struct of their addresses.

    Args:
        make: the struct's constructor in the core's module.
        aligned: copy a tensor that does not start on 16 bytes.
        dtype: the core's number of how it computes; as a rule that of the tensors' dtype.
    """

    def __init__(
        self,
        x: Inputs,
        make: Callable[..., Any],
        *,
        aligned: bool = False,
        dtype: int | None = None,
    ) -> None:
        self.kept: list[Tensor] = []
        self._aligned = aligned
        self.native = make(
            dtype=DTYPES[x.u.dtype] if dtype is None else dtype,
            rows=x.u.shape[0],
            items=x.v.shape[0],
            dim=x.u.shape[1],
            context=self.address(x.u),
            item=self.address(x.v),
            item_bias=self.address(x.bias),
            action=self.address(x.action),
            temperature=x.temperature,
            reward=reward_kind(x),
            dense=self.address(x.dense),
            reward_dim=0 if x.e is None else x.e.shape[1],
            reward_context=self.address(x.e),
            reward_item=self.address(x.t),
            reward_bias=self.address(x.c),
        )

    def address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        plain = tensor.detach().contiguous()
        if self._aligned and plain.data_ptr() % 16 != 0:
            plain = plain.clone()
        self.kept.append(plain)
        return plain.data_ptr()


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
    make = torch.empty
    terms = Terms(
        make(rows), make(rows), make(reward), make(reward), make(rows if entropy else 0),
        make(rows), make(rows),
    )  # fmt: skip
    addresses: dict[str, Any] = {name: address(tensor) for name, tensor in terms._asdict().items()}
    _cpu.forward(operands.native, **addresses, **_setting(x))
    return terms


def running_sums(x: Inputs, entropy: bool) -> tuple[RunningSums, Tensor, Tensor | None]:
    """Sums over the items of `x`, logits (-inf) and rewards (0) of actions (-1 if elsewhere)."""
    from offtower.ops import _cpu

    operands = Operands(x, _cpu.Operands)
    rows = x.u.shape[0]
    top, total, logit = (torch.empty(rows) for _ in range(3))
    reward = torch.empty(rows) if x.has_reward else None
    action_reward = torch.empty(rows) if x.has_reward else None
    centred = torch.empty(rows) if entropy else None
    _cpu.forward(
        operands.native,
        anchor=address(top),
        total=address(total),
        reward_sum=address(reward),
        centred_sum=address(centred),
        action_logit=address(logit),
        action_reward=address(action_reward),
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
    db = torch.empty(x.v.shape[0], dtype=x.u.dtype) if need_b and x.bias is not None else None
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
    addresses: dict[str, Any] = {
        name: operands.address(as_float32(tensor)) for name, tensor in given.items()
    }
    _cpu.backward(
        operands.native,
        **addresses,
        context=address(du),
        item=address(dv),
        item_bias=address(db),
        **_setting(x),
    )
    return du, dv, db


def top_k(x: Inputs, k: int) -> tuple[Tensor, Tensor]:
    """Scores (B, k) float32, falling, and item numbers (B, k); of equal scores the lowest first."""
    from offtower.ops import _cpu

    operands = Operands(x, _cpu.Operands)
    score = torch.empty(x.u.shape[0], k)
    index = torch.empty(x.u.shape[0], k, dtype=torch.int64)
    _cpu.top_k(operands.native, k=k, score=score.data_ptr(), index=index.data_ptr(), **_setting(x))
    return score, index


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def as_float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
