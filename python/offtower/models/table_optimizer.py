"""Optimisers that move only the rows of an embedding table that a step touched.

A table of a million items and width 64 has 256 MB of weights; a dense step reads and writes all of
them, and twice that of moments. Here a step costs what it touches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Table = nn.Embedding | nn.EmbeddingBag


class TableOptimizer(torch.optim.Optimizer):
    """Shared parts: the step at which each row is up to date, and catching up before it is read.

    What a dense optimiser does to a row without a gradient (weight decay, moments that fade) is
    done for all steps since, at once, right before a forward pass reads the row: the pass sees the
    weights that it would have seen.

    Args:
        tables: embedding layers; their gradients become sparse.
        learning_rate, weight_decay: as in AdamW; decay is decoupled from the gradient.
    """

    def __init__(self, tables: Sequence[Table], learning_rate: float, weight_decay: float) -> None:
        defaults = {"lr": learning_rate, "weight_decay": weight_decay}
        super().__init__([table.weight for table in tables], defaults)
        self.steps = 0
        self._tables = list(tables)
        for table in tables:
            table.sparse = True
            weight = table.weight
            self.state[weight] = self._new_state(weight)
            self.state[weight]["fresh_at"] = torch.zeros(
                len(weight), dtype=torch.int64, device=weight.device
            )
            table.register_forward_pre_hook(_CatchUp(self))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Rows with a gradient, summed where several lookups hit one."""
        group = self.param_groups[0]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            if weight.grad.is_sparse:
                gradient = weight.grad.coalesce()
                index, values = gradient._indices()[0], gradient._values()
            else:
                index, values = torch.arange(len(weight), device=weight.device), weight.grad
            self.catch_up(weight, index)
            self._move(weight, self.state[weight], index, values, group)
            self.state[weight]["fresh_at"][index] = self.steps + 1
        self.steps += 1

    @torch.no_grad()
    def catch_up(self, weight: Tensor, index: Tensor) -> None:
        """Do to the rows at `index` what the steps since they were touched would have done."""
        state, group = self.state[weight], self.param_groups[0]
        if not weight.is_cuda:
            late = state["fresh_at"][index] < self.steps
            if not bool(late.any()):
                return
            index = torch.unique(index[late])
        # A GPU is not asked which rows are late, which would be waited for: it takes all of them,
        # the others by no step, and a row that stands twice gets one value twice.
        missed = (self.steps - state["fresh_at"][index]).to(torch.float64)
        kept = (1.0 - group["lr"] * group["weight_decay"]) ** missed
        weight[index] = weight[index] * kept.to(weight.dtype)[:, None]
        self._fade(state, index, missed)
        state["fresh_at"][index] = self.steps

    def finish_updates(self) -> None:
        """Bring every row up to date, in blocks."""
        for weight in self.param_groups[0]["params"]:
            for index in torch.arange(len(weight), device=weight.device).split(262_144):
                self.catch_up(weight, index)

    def state_dict(self) -> dict[str, Any]:
        content = super().state_dict()
        for number, state in content["state"].items():
            content["state"][number] = {**state, "steps": torch.tensor(self.steps, device="cpu")}
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The base class would turn the step numbers into the weights' dtype.
        for number, weight in enumerate(self.param_groups[0]["params"]):
            state = dict(state_dict["state"][number])
            self.steps = int(state.pop("steps"))
            self.state[weight] = {
                key: value.to(weight.device, copy=True) for key, value in state.items()
            }

    @abstractmethod
    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Of an untouched table."""

    @abstractmethod
    def _fade(self, state: dict[str, Tensor], index: Tensor, missed: Tensor) -> None:
        """What `missed` (k,) steps without a gradient do to the state of rows."""

    @abstractmethod
    def _move(
        self,
        weight: Tensor,
        state: dict[str, Tensor],
        index: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
    ) -> None:
        """One step for distinct rows `index` (k,) with gradients (k, dim)."""


class LazyAdamW(TableOptimizer):
    """AdamW on touched rows.

    Moments and weight decay are those of dense AdamW at every step; a row that has no gradient is
    not moved by what is left of its momentum. With beta1 = 0, or where every step touches every
    row, this is dense AdamW.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def _fade(self, state: dict[str, Tensor], index: Tensor, missed: Tensor) -> None:
        for name, beta in (("exp_avg", self.beta1), ("exp_avg_sq", self.beta2)):
            moment = state[name]
            kept = torch.full_like(missed, beta).pow_(missed).to(moment.dtype)
            moment[index] = moment[index] * kept[:, None]

    def _move(
        self,
        weight: Tensor,
        state: dict[str, Tensor],
        index: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
    ) -> None:
        step = self.steps + 1
        first = state["exp_avg"][index].lerp_(gradient, 1 - self.beta1)
        second = state["exp_avg_sq"][index].mul_(self.beta2)
        second.addcmul_(gradient, gradient, value=1 - self.beta2)
        state["exp_avg"][index], state["exp_avg_sq"][index] = first, second
        rate = group["lr"]
        size = rate / (1 - self.beta1**step)
        scale = (second / (1 - self.beta2**step)).sqrt_().add_(self.epsilon)
        moved = weight[index].mul_(1 - rate * group["weight_decay"])
        weight[index] = moved.addcdiv_(first, scale, value=-size)


class RowwiseAdagrad(TableOptimizer):
    """Adagrad with one accumulator a row, the mean square of its gradients: 4 bytes a row of state.

    Source: Duchi, Hazan and Singer 2011; by row as in Mudigere et al. 2022, "Software-hardware
    co-design for fast and scalable training of deep learning recommendation models".
    """

    epsilon = 1e-8

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"sum": weight.new_zeros(len(weight))}

    def _fade(self, state: dict[str, Tensor], index: Tensor, missed: Tensor) -> None:
        """Sums do not fade."""

    def _move(
        self,
        weight: Tensor,
        state: dict[str, Tensor],
        index: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
    ) -> None:
        total = state["sum"][index] + gradient.square().mean(dim=1)
        state["sum"][index] = total
        moved = weight[index].mul_(1 - group["lr"] * group["weight_decay"])
        scale = total.sqrt_().add_(self.epsilon)[:, None]
        weight[index] = moved.addcdiv_(gradient, scale, value=-group["lr"])


class _CatchUp:
    """Forward hook of a table. A copy of the layer is not the optimiser's, so it gets none."""

    def __init__(self, optimizer: TableOptimizer | None) -> None:
        self._optimizer = optimizer

    def __call__(self, table: Table, arguments: tuple[Tensor, ...]) -> None:
        if self._optimizer is not None:
            self._optimizer.catch_up(table.weight, arguments[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> _CatchUp:
        return _CatchUp(None)
