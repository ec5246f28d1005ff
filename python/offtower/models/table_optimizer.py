"""Optimizers that update only the rows of an embedding table that a step touched.

A dense step on a table of a million items and width 64 reads and writes 256 MB of weights, and
twice that of moments.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Table = nn.Embedding | nn.EmbeddingBag


class TableOptimizer(torch.optim.Optimizer):
    """Base class: tracks the step of each row's last update and catches up before it is read.

    The weight decay and moment decay that a dense optimizer applies to rows without a gradient are
    applied for all missed steps at once, right before a forward pass reads the row.

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
        """Update the rows with a gradient, summed over lookups of the same row."""
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
            self._update(weight, self.state[weight], index, values, group)
            self.state[weight]["fresh_at"][index] = self.steps + 1
        self.steps += 1

    @torch.no_grad()
    def catch_up(self, weight: Tensor, index: Tensor) -> None:
        """Apply the decay of all steps since the rows at `index` were last updated."""
        state, group = self.state[weight], self.param_groups[0]
        if not weight.is_cuda:
            late = state["fresh_at"][index] < self.steps
            if not bool(late.any()):
                return
            index = torch.unique(index[late])
        # On a GPU selecting the late rows would synchronize: all rows are updated, by zero steps
        # where they are current, and duplicates get the same value twice.
        missed = (self.steps - state["fresh_at"][index]).to(torch.float64)
        kept = (1.0 - group["lr"] * group["weight_decay"]) ** missed
        weight[index] = weight[index] * kept.to(weight.dtype)[:, None]
        self._decay(state, index, missed)
        state["fresh_at"][index] = self.steps

    def finish_updates(self) -> None:
        """Catch up all rows, in blocks."""
        for weight in self.param_groups[0]["params"]:
            for index in torch.arange(len(weight), device=weight.device).split(262_144):
                self.catch_up(weight, index)

    def state_dict(self) -> dict[str, Any]:
        content = super().state_dict()
        for number, state in content["state"].items():
            content["state"][number] = {**state, "steps": torch.tensor(self.steps, device="cpu")}
        return content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The base class would cast the step numbers to the weights' dtype.
        for number, weight in enumerate(self.param_groups[0]["params"]):
            state = dict(state_dict["state"][number])
            self.steps = int(state.pop("steps"))
            self.state[weight] = {
                key: value.to(weight.device, copy=True) for key, value in state.items()
            }

    @abstractmethod
    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """State of an untouched table."""

    @abstractmethod
    def _decay(self, state: dict[str, Tensor], index: Tensor, missed: Tensor) -> None:
        """Decay the state of rows by `missed` (k,) steps without a gradient."""

    @abstractmethod
    def _update(
        self,
        weight: Tensor,
        state: dict[str, Tensor],
        index: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
    ) -> None:
        """Update distinct rows `index` (k,) with gradients (k, dim)."""


class LazyAdamW(TableOptimizer):
    """AdamW on touched rows.

    Moments and weight decay equal those of dense AdamW at every step, but a row without a gradient
    is not moved by its momentum. With beta1 = 0, or if every step touches every row, this is dense
    AdamW.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization".
    """

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def _decay(self, state: dict[str, Tensor], index: Tensor, missed: Tensor) -> None:
        for name, beta in (("exp_avg", self.beta1), ("exp_avg_sq", self.beta2)):
            moment = state[name]
            kept = torch.full_like(missed, beta).pow_(missed).to(moment.dtype)
            moment[index] = moment[index] * kept[:, None]

    def _update(
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
    """Adagrad with one accumulator per row, the mean square of its gradients: 4 bytes per row.

    Source: Duchi, Hazan and Singer 2011; by row as in Mudigere et al. 2022, "Software-hardware
    co-design for fast and scalable training of deep learning recommendation models".
    """

    epsilon = 1e-8

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"sum": weight.new_zeros(len(weight))}

    def _decay(self, state: dict[str, Tensor], index: Tensor, missed: Tensor) -> None:
        """Sums do not decay."""

    def _update(
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
    """Forward hook of a table; copies of the layer are not optimized, so they get an inert one."""

    def __init__(self, optimizer: TableOptimizer | None) -> None:
        self._optimizer = optimizer

    def __call__(self, table: Table, arguments: tuple[Tensor, ...]) -> None:
        if self._optimizer is not None:
            self._optimizer.catch_up(table.weight, arguments[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> _CatchUp:
        return _CatchUp(None)
