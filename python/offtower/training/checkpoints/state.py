"""Tensors of a run by name, in workers and in checkpoints.

policy/<name>   optimizer/<number of the parameter>/<key>   extra/<name>

A tensor whose rows are divided among workers is stored over the whole catalogue in its order, with
row 0 apart as <name>.unknown, so that any number of workers can read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from offtower.errors import RunError

_SHARED = ".unknown"
_ROW_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "fresh_at", "sum", "momentum_buffer")
"""State of optimizers with a row per row of a weight."""
_ITEM_TOWER = "item_tower."


@dataclass(frozen=True)
class OwnedRows:
    """Weights whose rows are divided among workers.

    Attributes:
        weights: names in the policy's state; row 0 is the unknown item, then a row for each of the
            worker's items.
        items: of this worker.
        total: of the whole catalogue.
    """

    weights: frozenset[str] = frozenset()
    items: int = 0
    total: int = 0


def check_tensors(
    tensors: Mapping[str, Tensor], policy: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Compare names and shapes with those of the policy and of the optimizer's parameters.

    Raises:
        RunError: one is missing, unknown, or of another shape.
    """
    found = {name: tuple(tensor.shape) for name, tensor in _under("policy", tensors).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise RunError(
                f"its tensor '{name}' is {found.get(name, 'missing')}, "
                f"but the policy's is {wanted.get(name, 'missing')}"
            )
    if optimizer is None:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in _under("optimizer", tensors).items():
        index, _, key = name.partition("/")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise RunError(f"its optimizer state '{name}' belongs to no parameter")
        if key in _ROW_STATE and tensor.shape[:1] != parameters[int(index)].shape[:1]:
            raise RunError(f"its optimizer state '{name}' has {tensor.shape[:1]} rows")


def policy_tensors(policy: nn.Module) -> dict[str, Tensor]:
    return {f"policy/{name}": value for name, value in policy.state_dict().items()}


def fill_policy(policy: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    policy.load_state_dict(_under("policy", tensors))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is None:
                continue
            tensor = (
                value
                if isinstance(value, Tensor)
                else torch.tensor(
                    value,
                    dtype=torch.int64 if isinstance(value, int) else torch.float32,
                    device="cpu",
                )
            )
            tensors[f"optimizer/{index}/{key}"] = tensor.contiguous()
    return tensors


def fill_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    content = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in _under("optimizer", tensors).items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = tensor
    content["state"] = state
    optimizer.load_state_dict(content)


def extra_tensors(extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"extra/{name}": value for name, value in extra.items()}


def extra_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _under("extra", tensors)


def owned_names(
    owned: OwnedRows, policy: nn.Module, optimizer: torch.optim.Optimizer | None
) -> set[str]:
    """Return the names of all tensors whose rows are divided among workers."""
    names = {f"policy/{name}" for name in owned.weights}
    # Averages of the weights over steps.
    names.update(f"extra/average/{name}" for name in owned.weights)
    # Towers of a top-k proposal.
    towers = [name.removeprefix(_ITEM_TOWER) for name in owned.weights if _ITEM_TOWER in name]
    names.update(f"extra/{when}/tower/{name}" for when in ("current", "pending") for name in towers)
    if optimizer is None or not owned.weights:
        return names
    parameters = dict(policy.named_parameters())
    mine = {id(parameters[name]) for name in owned.weights}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(order):
        if id(parameter) in mine:
            names.update(f"optimizer/{number}/{key}" for key in _ROW_STATE)
    return names


class Layout:
    """Converts between a worker's tensors and those of a checkpoint.

    Args:
        owned: rows of this worker.
        mesh: over all workers; None for a single one.
    """

    def __init__(self, owned: OwnedRows, mesh: DeviceMesh | None) -> None:
        self._owned, self._mesh = owned, mesh

    def to_checkpoint(
        self, tensors: Mapping[str, Tensor], names: Iterable[str]
    ) -> dict[str, Tensor]:
        """Convert to a checkpoint's tensors; `names` are those of `owned_names`."""
        split = set(names)
        state: dict[str, Tensor] = {}
        for name, value in tensors.items():
            # Checkpoints are on the CPU, so that any device can resume.
            value = value.detach().cpu().contiguous()
            if name in split:
                state[name + _SHARED] = value[:1].contiguous()
                shape = (self._owned.total, *value.shape[1:])
                state[name] = self._part(value[1:].contiguous(), shape)
            else:
                state[name] = value
        return state

    def empty(self, entries: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
        """Allocate a checkpoint's tensors from its metadata by name."""
        split = set(names)
        state: dict[str, Tensor] = {}
        for name, entry in entries.items():
            shape, dtype = tuple(entry.size), entry.properties.dtype
            if name in split:
                rows = torch.empty((self._owned.items, *shape[1:]), dtype=dtype, device="cpu")
                state[name] = self._part(rows, shape)
            else:
                state[name] = torch.empty(shape, dtype=dtype, device="cpu")
        return state

    def from_checkpoint(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, value in state.items():
            if name.endswith(_SHARED):
                continue
            rows = value.to_local() if isinstance(value, DTensor) else value
            shared = state.get(name + _SHARED)
            tensors[name] = rows if shared is None else torch.cat([shared, rows])
        return tensors

    def _part(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self._mesh is None:
            return rows
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )


def _under(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
