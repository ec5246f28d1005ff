"""Base of the native cores: allocates results, which a core's module fills.

Operands have passed `checks` and the core's `refusal`: float32 or bfloat16 on the core's device.
The modules take arrays as DLPack capsules and check them again (csrc/bindings/arguments.h).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from offtower.ops.tiled_draws import DrawSettings, SoftmaxDraws, tile_items
from offtower.ops.types import (
    Cotangents,
    Eligibility,
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
        by_group = _ByGroup(x)
        found = self._forward(by_group.operands, entropy)
        return ForwardResults(*(by_group.restored(value) for value in found))

    def partial(self, x: Operands, entropy: bool) -> PartialTerms:
        by_group = _ByGroup(x)
        return self._partial(by_group.operands, entropy).map(by_group.restored)

    def backward(
        self, x: Operands, forward: ForwardStatistics, g: Cotangents, needs: Needs
    ) -> Gradients:
        by_group = _ByGroup(x)
        found = self._backward(
            by_group.operands,
            ForwardStatistics(*(by_group.of_rows(part) for part in forward)),  # type: ignore[arg-type]
            Cotangents(*(by_group.of_rows(part) for part in g)),
            needs,
        )
        context = None if found.context is None else by_group.restored(found.context)
        return found._replace(context=context)

    def top_k(self, x: Operands, k: int) -> tuple[Tensor, Tensor]:
        by_group = _ByGroup(x)
        score, index = self._top_k(by_group.operands, k)
        return by_group.restored(score), by_group.restored(index)

    def draw(self, x: Operands, settings: DrawSettings) -> SoftmaxDraws:
        by_group = _ByGroup(x)
        stream = by_group.of_rows(settings.stream)
        assert stream is not None
        found = self._draw(by_group.operands, replace(settings, stream=stream))
        return found.map(by_group.restored)

    def _forward(self, x: Operands, entropy: bool) -> ForwardResults:
        make = functools.partial(x.context.new_empty, dtype=torch.float32)
        rows, reward = x.rows, 0 if x.reward is None else x.rows
        results = ForwardResults(
            make(rows), make(rows), make(reward), make(reward), make(rows if entropy else 0),
            make(rows), make(rows),
        )  # fmt: skip
        self._run("forward", self._prepare(x), results._asdict())
        return results

    def _partial(self, x: Operands, entropy: bool) -> PartialTerms:
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

    def _backward(
        self, x: Operands, forward: ForwardStatistics, g: Cotangents, needs: Needs
    ) -> Gradients:
        prepared = self._prepare(x)
        make = x.context.new_empty
        found = Gradients(
            make(prepared.context.shape) if needs.context else None,
            self._empty_gradient(prepared.item) if needs.item else None,
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

    def _top_k(self, x: Operands, k: int) -> tuple[Tensor, Tensor]:
        score = x.context.new_empty(x.rows, k, dtype=torch.float32)
        index = x.context.new_empty(x.rows, k, dtype=torch.int64)
        self._run("top_k", self._prepare(x), {"score": score, "index": index}, k=k)
        return score, index

    def _draw(self, x: Operands, settings: DrawSettings) -> SoftmaxDraws:
        make = functools.partial(x.context.new_empty, dtype=torch.float32)
        shape = x.rows, settings.num_samples
        found = SoftmaxDraws(
            x.context.new_empty(shape, dtype=torch.int64), make(shape), make(x.rows), make(x.rows)
        )
        self._run(
            "draw",
            self._prepare(x),
            {"stream": settings.stream, **found._asdict()},
            samples=settings.num_samples,
            replacement=settings.replacement,
            seed=settings.seed,
            tile=tile_items(x.items),
        )
        return found

    def _empty_gradient(self, like: Tensor) -> Tensor:
        return torch.empty_like(like)

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


class _ByGroup:
    """Operands with rows sorted by group, so that the kernels' blocks of rows share eligible items.

    Rows keep their order without groups, and where a dense reward's (B, N) array would be copied.
    """

    def __init__(self, x: Operands) -> None:
        self.operands = x
        self.order: Tensor | None = None
        dense = x.reward is not None and x.reward.dense is not None
        if x.eligible is None or x.eligible.group is None or x.rows < 2 or dense:
            return
        order = torch.argsort(x.eligible.group, stable=True)
        reward = x.reward
        if reward is not None and reward.context is not None:
            reward = replace(reward, context=reward.context[order])
        self.order = order
        self.operands = replace(
            x,
            context=x.context[order],
            action=x.action[order],
            reward=reward,
            eligible=x.eligible.take(order),
        )

    def of_rows(self, values: Tensor | None) -> Tensor | None:
        """Given values of the rows, in the order of the operands."""
        return values if values is None or self.order is None else values[self.order]

    def restored(self, values: Tensor) -> Tensor:
        """Results of the operands, in the order of the given rows; empty ones stay empty."""
        if self.order is None or not values.numel():
            return values
        found = torch.empty_like(values)
        found[self.order] = values
        return found


def native_operands(x: Operands, make: Callable[..., Any], **options: bool) -> Any:
    """A module's own operands; `make` is their constructor."""
    reward, eligible = x.reward or RewardOperands(), x.eligible or Eligibility()
    excluded = eligible.excluded
    arrays = {
        "context": x.context,
        "item": x.item,
        "item_bias": x.item_bias,
        "action": x.action,
        "dense": reward.dense,
        "reward_context": reward.context,
        "reward_item": reward.item,
        "reward_bias": reward.item_bias,
        "group": eligible.group,
        "bitmap": eligible.bitmap,
        "excluded_offsets": None if excluded is None else excluded.offsets,
        "excluded_items": None if excluded is None else excluded.items,
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
