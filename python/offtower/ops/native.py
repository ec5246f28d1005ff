"""Base of the native cores: allocates results, which a core's module fills.

Operands have passed `checks` and the core's `refusal`: float32 or bfloat16 on the core's device.
The modules take arrays as DLPack capsules and check them again (csrc/bindings/arguments.h).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from offtower.ops.types import (
    Cotangents,
    ForwardResults,
    ForwardStatistics,
    Gradients,
    Needs,
    Operands,
    PartialTerms,
    RewardOperands,
    RunningSums,
)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes of native cores, and their numbers in csrc/operands.h."""


class NativeCore(ABC):
    """A core whose kernels live in a compiled module."""

    def forward(self, x: Operands, entropy: bool) -> ForwardResults:
        make = functools.partial(x.context.new_empty, dtype=torch.float32)
        rows, reward = x.rows, 0 if x.reward is None else x.rows
        results = ForwardResults(
            make(rows), make(rows), make(reward), make(reward), make(rows if entropy else 0),
            make(rows), make(rows),
        )  # fmt: skip
        self._run("forward", self._prepare(x), results._asdict())
        return results

    def partial(self, x: Operands, entropy: bool) -> PartialTerms:
        make = functools.partial(x.context.new_empty, x.rows, dtype=torch.float32)
        top, total, action_logit = make(), make(), make()
        reward, action_reward = (None, None) if x.reward is None else (make(), make())
        centered = make() if entropy else None
        results = {
            "reference_max": top,
            "total": total,
            "reward_sum": reward,
            "centered_sum": centered,
            "action_logit": action_logit,
            "action_reward": action_reward,
        }
        self._run("forward", self._prepare(x), results)
        return PartialTerms(RunningSums(top, total, reward, centered), action_logit, action_reward)

    def backward(
        self, x: Operands, forward: ForwardStatistics, g: Cotangents, needs: Needs
    ) -> Gradients:
        prepared = self._prepare(x)
        make = x.context.new_empty
        found = Gradients(
            make(prepared.context.shape) if needs.context else None,
            make(prepared.item.shape) if needs.item else None,
            make(x.items) if needs.item_bias else None,
        )
        read = {
            **forward._asdict(),
            **{f"g_{name}": cotangent for name, cotangent in g._asdict().items()},
        }
        arrays = {
            name: None if array is None else self._prepare_array(array.float())
            for name, array in read.items()
        }
        self._run("backward", prepared, {**arrays, **found._asdict()})
        return Gradients(
            _narrowed(found.context, x.context.shape[1]),
            _narrowed(found.item, x.item.shape[1]),
            found.item_bias,
        )

    def top_k(self, x: Operands, k: int) -> tuple[Tensor, Tensor]:
        score = x.context.new_empty(x.rows, k, dtype=torch.float32)
        index = x.context.new_empty(x.rows, k, dtype=torch.int64)
        self._run("top_k", self._prepare(x), {"score": score, "index": index}, k=k)
        return score, index

    def _prepare(self, x: Operands) -> Operands:
        """The operands as the kernels take them; embeddings may become wider."""
        return x.map(self._prepare_array)

    def _prepare_array(self, array: Tensor) -> Tensor:
        return array.detach().contiguous()

    @abstractmethod
    def _run(
        self, function: str, x: Operands, arrays: Mapping[str, Tensor | None], **numbers: int
    ) -> None:
        """Call a function of the module; empty arrays count as absent."""


def native_operands(x: Operands, make: Callable[..., Any], **options: bool) -> Any:
    """A module's own operands; `make` is their constructor."""
    reward = x.reward or RewardOperands()
    arrays = {
        "context": x.context,
        "item": x.item,
        "item_bias": x.item_bias,
        "action": x.action,
        "dense": reward.dense,
        "reward_context": reward.context,
        "reward_item": reward.item,
        "reward_bias": reward.item_bias,
    }
    capsules = {name: to_dlpack(array) for name, array in arrays.items() if array is not None}
    return make(**capsules, temperature=x.temperature, sigmoid=reward.sigmoid, **options)


def capsules(arrays: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """DLPack capsules of the arrays that are there and not empty."""
    return {
        name: to_dlpack(array)
        for name, array in arrays.items()
        if array is not None and array.numel()
    }


def _narrowed(gradient: Tensor | None, width: int) -> Tensor | None:
    if gradient is None or gradient.shape[1] == width:
        return gradient
    return gradient[:, :width].contiguous()
