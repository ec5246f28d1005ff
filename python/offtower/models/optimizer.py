"""Optimizers by name, and gradient clipping with sparse parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offtower.errors import ConfigError
from offtower.models.features import embedding_tables
from offtower.models.table_optimizer import LazyAdamW, RowwiseAdagrad, TableOptimizer

TableUpdates = Literal["dense", "lazy_adamw", "rowwise_adagrad"]


def make_optimizer(
    name: Literal["adamw", "adam", "sgd"],
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    tables: TableUpdates = "dense",
    table_learning_rate: float | None = None,
) -> torch.optim.Optimizer:
    """`adam` adds weight decay to the gradient (L2), `adamw` decouples it (Loshchilov 2019).

    Args:
        tables: updates of embedding tables: dense, or only the rows that a step touched (with
            sparse gradients).
        table_learning_rate: of the tables; None is `learning_rate`.

    Raises:
        ConfigError: lazy_adamw with an optimizer other than adamw.
    """
    if tables == "dense":
        return _dense(name, list(module.parameters()), learning_rate, weight_decay)
    if tables == "lazy_adamw" and name != "adamw":
        raise ConfigError(
            f"training.table_updates=lazy_adamw requires training.optimizer=adamw, not '{name}'; "
            "use rowwise_adagrad or dense"
        )
    layers = [layer for layer in embedding_tables(module) if layer.weight.requires_grad]
    if not layers:
        return _dense(name, list(module.parameters()), learning_rate, weight_decay)
    kind = LazyAdamW if tables == "lazy_adamw" else RowwiseAdagrad
    rate = learning_rate if table_learning_rate is None else table_learning_rate
    by_rows = kind(layers, rate, weight_decay)
    ids = {id(layer.weight) for layer in layers}
    others = [p for p in module.parameters() if id(p) not in ids]
    if not others:
        return by_rows
    return JointOptimizer(_dense(name, others, learning_rate, weight_decay), by_rows)


def finish_updates(optimizer: torch.optim.Optimizer) -> None:
    """Apply the pending decay of rows that recent steps did not touch, before weights are read."""
    if isinstance(optimizer, (TableOptimizer, JointOptimizer)):
        optimizer.finish_updates()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their joint norm is at most `max_norm`.

    Returns:
        The norm before clipping, a scalar; on a GPU without a synchronization.
    """
    parameters = [p for p in parameters if p.grad is not None]
    sparse = False
    for parameter in parameters:
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            sparse = True
            # A row that several draws touched counts once, with its sum.
            parameter.grad = parameter.grad.coalesce()
    if not sparse:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    values = [_values(p.grad) for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([v.norm() for v in values]))
    scale_down(values, norm, max_norm)
    return norm


def scale_down(values: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale tensors with the joint norm `norm` in place, to at most `max_norm`."""
    if norm.is_cuda:
        factor = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
        for value in values:
            value.mul_(factor)
    elif float(norm) > max_norm:
        for value in values:
            value.mul_(max_norm / (float(norm) + 1e-6))


class JointOptimizer(torch.optim.Optimizer):
    """A dense optimizer and a table optimizer behind one interface."""

    def __init__(self, dense: torch.optim.Optimizer, tables: TableOptimizer) -> None:
        self.dense, self.tables = dense, tables
        super().__init__([*dense.param_groups, *tables.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.dense.step()
        self.tables.step()

    def finish_updates(self) -> None:
        self.tables.finish_updates()

    def state_dict(self) -> dict[str, Any]:
        """The tables' parameter numbers follow the dense ones."""
        first, second = self.dense.state_dict(), self.tables.state_dict()
        state = dict(first["state"])
        state.update({self._shift + number: s for number, s in second["state"].items()})
        return {"state": state, "param_groups": [first["param_groups"], second["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state, (first, second) = state_dict["state"], state_dict["param_groups"]
        shift = self._shift
        of_tables = {number - shift: s for number, s in state.items() if number >= shift}
        of_others = {number: s for number, s in state.items() if number < shift}
        self.dense.load_state_dict({"state": of_others, "param_groups": first})
        self.tables.load_state_dict({"state": of_tables, "param_groups": second})

    @property
    def _shift(self) -> int:
        return sum(len(group["params"]) for group in self.dense.param_groups)


def _dense(
    name: str, parameters: list[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    parameters = [p for p in parameters if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def _values(gradient: Tensor) -> Tensor:
    """The values of a dense or coalesced gradient, as a view."""
    return gradient._values() if gradient.is_sparse else gradient
