"""Checkpoints: all that a run needs to go on as if it had never stopped.

checkpoints/step_000000001234/   state.json (cursor, counters, checksum)   tensors.safetensors
checkpoints/best_000000001200.safetensors    the policy's weights at the best validation so far

Random numbers need no storing: they are functions of (seed, epoch, window, batch).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from offtower.atomic import remove_leftovers, replace_directory, write_text
from offtower.data.order import Cursor
from offtower.errors import RunError
from offtower.models.store import load_weights, save_weights

_NAME = re.compile(r"step_(\d{12})")


@dataclass
class Progression:
    """Where a run stands."""

    cursor: Cursor
    step: int = 0
    rows: int = 0
    best_step: int | None = None
    best_score: float | None = None
    """Lower bound of the validation estimate at `best_step`."""
    validations_without_gain: int = 0
    finished: bool = False
    epoch_sums: dict[str, float] | None = None
    """Running sums of the epoch under way, so that its metrics line is whole after a resumption."""


class Checkpoints(Protocol):
    """What the loop asks of a store; all workers of a run call the same methods in step."""

    extra: dict[str, Tensor]
    """What `load_newest` found beside policy and optimiser."""
    skipped: list[str]
    """What was wrong with checkpoints that could not be read."""

    def save(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        progression: Progression,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint, or begin to; `extra` is what else the run must have to go on."""

    def finish(self) -> None:
        """Wait for what was begun."""

    @property
    def written(self) -> bool:
        """Whether `finish` would not wait here for what was begun."""

    def save_best(self, policy: nn.Module, step: int) -> None:
        """Keep the policy's weights at the best validation so far."""

    def load_best(self, policy: nn.Module, step: int) -> None:
        """Fill the policy with what `save_best` kept."""

    def load_newest(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Progression | None:
        """Fill policy and optimiser from the newest readable checkpoint; None without one."""


class CheckpointStore:
    """Writes, finds and reads the checkpoints of one run.

    Args:
        directory: the run's `checkpoints` folder.
        fingerprint: of the configuration and data; a checkpoint of another one is refused.
        kept: how many of the newest stay.
    """

    def __init__(self, directory: Path, fingerprint: str, kept: int) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._kept = kept
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        self.extra: dict[str, Tensor] = {}
        """What `load_newest` found beside policy and optimiser."""
        self.skipped: list[str] = []
        """What was wrong with checkpoints that could not be read."""

    def save(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        progression: Progression,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint; `extra` tensors are what else the run must have to go on."""
        path = self._directory / f"step_{progression.step:012d}"
        with replace_directory(path) as temporary:
            tensors = {f"policy/{k}": v.contiguous() for k, v in policy.state_dict().items()}
            tensors.update(optimizer_tensors(optimizer))
            tensors.update({f"extra/{k}": v.contiguous() for k, v in (extra or {}).items()})
            file = temporary / "tensors.safetensors"
            safetensors.torch.save_file(tensors, file)
            state = {
                "fingerprint": self._fingerprint,
                "progression": asdict(progression),
                "sha256": _sha256(file),
            }
            write_text(temporary / "state.json", json.dumps(state, indent=2))
        self._prune(progression.best_step)

    def finish(self) -> None:
        """A checkpoint is whole when `save` returns."""

    @property
    def written(self) -> bool:
        return False

    def save_best(self, policy: nn.Module, step: int) -> None:
        path = self._best_path(step)
        temporary = path.with_name(f".{path.name}.partial")
        save_weights(temporary, policy)
        temporary.replace(path)

    def load_best(self, policy: nn.Module, step: int) -> None:
        load_weights(self._best_path(step), policy)

    def load_newest(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Progression | None:
        """Fill policy and optimiser from the newest readable checkpoint; None where there is none.

        Damaged checkpoints are passed over, and named in `skipped`.

        Raises:
            RunError: a checkpoint belongs to another configuration or other data.
        """
        for path in reversed(self._paths()):
            try:
                state = json.loads((path / "state.json").read_text(encoding="utf-8"))
                if state["fingerprint"] != self._fingerprint:
                    raise RunError(
                        f"checkpoint '{path}' was written with another configuration or other "
                        "data; use another run name, or restore the configuration"
                    )
                file = path / "tensors.safetensors"
                if _sha256(file) != state["sha256"]:
                    self.skipped.append(f"{path.name}: tensors.safetensors is damaged")
                    continue
                tensors = safetensors.torch.load_file(file)
                known = dict(state["progression"])
                cursor = Cursor(**known.pop("cursor"))
                progression = Progression(cursor=cursor, **known)
                best = progression.best_step
                if best is not None and not self._best_path(best).exists():
                    self.skipped.append(f"{path.name}: its best policy is missing")
                    continue
            except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
                self.skipped.append(f"{path.name}: {error}")
                continue
            policy.load_state_dict(
                {
                    k.removeprefix("policy/"): v
                    for k, v in tensors.items()
                    if k.startswith("policy/")
                }
            )
            restore_optimizer(optimizer, tensors)
            self.extra = {
                k.removeprefix("extra/"): v for k, v in tensors.items() if k.startswith("extra/")
            }
            return progression
        return None

    def _paths(self) -> list[Path]:
        return sorted(p for p in self._directory.iterdir() if _NAME.fullmatch(p.name))

    def _best_path(self, step: int) -> Path:
        return self._directory / f"best_{step:012d}.safetensors"

    def _prune(self, best_step: int | None) -> None:
        kept = self._paths()[-self._kept :]
        for path in self._paths()[: -self._kept]:
            shutil.rmtree(path, ignore_errors=True)
        needed = {best_step}
        for path in kept:
            try:
                state = json.loads((path / "state.json").read_text(encoding="utf-8"))
                needed.add(state["progression"]["best_step"])
            except (OSError, KeyError, json.JSONDecodeError):
                continue
        names = {self._best_path(step).name for step in needed if step is not None}
        for path in self._directory.glob("best_*.safetensors"):
            if path.name not in names:
                path.unlink(missing_ok=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by name: optimizer/<number of the parameter>/<key>."""
    tensors: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is None:
                continue
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            tensors[f"optimizer/{index}/{key}"] = tensor.contiguous()
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    content = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = tensor
    content["state"] = state
    optimizer.load_state_dict(content)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
