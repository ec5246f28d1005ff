"""Checkpoints of a run on several workers: each writes what it has, any number reads them.

checkpoints/step_000000001234/   state.json (cursor, counters, checksums)   shard-*.safetensors
checkpoints/best_000000001200/   the same, of the policy's weights alone

Written by torch.distributed.checkpoint as safetensors: no pickle. Rows of owned tables are one
tensor over the whole catalogue, in its order, of which a worker writes and reads its part; so a run
goes on with another number of workers. Tensors are copied, written by a thread beside the training,
and the folder takes its name when all is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from offtower.atomic import remove_leftovers, sync_tree, write_text
from offtower.data.order import Cursor
from offtower.errors import RunError
from offtower.training.checkpoint import Progression, optimizer_tensors, restore_optimizer
from offtower.training.distributed.workers import Workers

_NAME = re.compile(r"(step|best)_(\d{12})")
_SHARED = ".unknown"
"""Row 0 of an owned table, beside its other rows."""


class OwnedRows:
    """Which tensors of a run have rows that belong to this worker.

    Args:
        weights: names of owned weights in the policy's state, with one row for the value "unknown"
            and then one for each item of the shard.
        total: items of the whole catalogue.
    """

    def __init__(self, weights: frozenset[str] = frozenset(), total: int = 0) -> None:
        self.weights = weights
        self.total = total


class DistributedCheckpointStore:
    """Writes, finds and reads the checkpoints of one run. Every method is collective.

    Args:
        directory: the run's `checkpoints` folder, the same storage for all workers.
        fingerprint: of the configuration and data; a checkpoint of another one is refused.
        kept: how many of the newest stay.
        workers: those that write.
        owned: tensors of which each worker has rows of its own.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: str,
        kept: int,
        workers: Workers,
        owned: OwnedRows | None = None,
    ) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._kept = kept
        self._workers = workers
        self._owned = owned or OwnedRows()
        # The writing thread's messages must not meet those of the training.
        self._group = dist.new_group(backend="gloo") if workers.size > 1 else None
        self._mesh = DeviceMesh("cpu", list(range(workers.size))) if workers.size > 1 else None
        self._pending: tuple[Future[Any], Path, Path, dict[str, Any]] | None = None
        self.extra: dict[str, Tensor] = {}
        """What `load_newest` found beside policy and optimiser."""
        self.skipped: list[str] = []
        """What was wrong with checkpoints that could not be read."""
        if workers.first:
            directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(directory)
        workers.barrier()

    def save(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        progression: Progression,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy the state and begin to write it; an earlier one is waited for first.

        Raises:
            RunError: the earlier one could not be written.
        """
        tensors = {f"policy/{name}": value for name, value in policy.state_dict().items()}
        tensors.update(optimizer_tensors(optimizer))
        tensors.update({f"extra/{name}": value for name, value in (extra or {}).items()})
        names = self._owned_names(policy, optimizer)
        self._write(
            self._directory / f"step_{progression.step:012d}",
            tensors,
            names,
            {"progression": asdict(progression)},
        )

    def save_best(self, policy: nn.Module, step: int) -> None:
        """Write the policy's weights, and wait for it."""
        state = {f"policy/{name}": value for name, value in policy.state_dict().items()}
        names = {f"policy/{name}" for name in self._owned.weights}
        self._write(self._directory / f"best_{step:012d}", state, names, {})
        self.finish()

    def load_best(self, policy: nn.Module, step: int) -> None:
        """Fill the policy with the weights of `save_best`.

        Raises:
            RunError: they are missing or damaged.
        """
        path = self._directory / f"best_{step:012d}"
        state, fault = self._checked(path)
        if state is None:
            raise RunError(f"the best policy at '{path}' cannot be read: {fault}")
        tensors = self._read(path, policy, None)
        _fill_policy(policy, tensors)

    def load_newest(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Progression | None:
        """Fill policy and optimiser from the newest readable checkpoint; None where there is none.

        Damaged checkpoints are passed over, and named in `skipped`.

        Raises:
            RunError: a checkpoint belongs to another configuration or other data.
        """
        for path in reversed(self._paths()):
            state, fault = self._checked(path)
            if state is None:
                self.skipped.append(f"{path.name}: {fault}")
                continue
            known = dict(state["progression"])
            cursor = Cursor(**known.pop("cursor"))
            progression = Progression(cursor=cursor, **known)
            best = progression.best_step
            if best is not None and self._checked(self._directory / f"best_{best:012d}")[0] is None:
                self.skipped.append(f"{path.name}: its best policy is missing or damaged")
                continue
            tensors = self._read(path, policy, optimizer)
            _fill_policy(policy, tensors)
            restore_optimizer(optimizer, tensors)
            self.extra = {
                k.removeprefix("extra/"): v for k, v in tensors.items() if k.startswith("extra/")
            }
            return progression
        return None

    def finish(self) -> None:
        """Wait until what is being written is written, and has its name.

        Raises:
            RunError: it could not be written, on this or another worker; older checkpoints stay.
        """
        if self._pending is None:
            return
        future, temporary, path, content = self._pending
        self._pending = None
        checksums: dict[str, str] = {}
        faults = self._together(lambda: future.result())
        if not faults:
            faults = self._together(
                lambda: checksums.update({f.name: _sha256(f) for f in self._own_files(temporary)})
            )
        found = self._workers.gather_objects(checksums)
        if not faults:
            content = {**content, "sha256": {k: v for part in found for k, v in part.items()}}
            faults = self._together(
                lambda: self._commit(temporary, path, content) if self._workers.first else None
            )
        if faults:
            if self._workers.first:
                shutil.rmtree(temporary, ignore_errors=True)
            newest = self._paths()
            left = f"the newest whole one is {newest[-1].name}" if newest else "there is none yet"
            raise RunError(
                f"checkpoint {path.name} could not be written ({'; '.join(faults)}); {left}. "
                f"Make room at '{self._directory}' and go on with --resume"
            )

    @property
    def written(self) -> bool:
        """Whether this worker has written what `save` began; `finish` then takes no time here."""
        return self._pending is not None and self._pending[0].done()

    def _together(self, work: Callable[[], object]) -> list[str]:
        """Do it on every worker; what went wrong, on any, is known to all."""
        fault: str | None = None
        try:
            work()
        except Exception as error:
            fault = _cause(error)
        found = self._workers.gather_objects(fault)
        return sorted({f"worker {k}: {one}" for k, one in enumerate(found) if one is not None})

    def _write(
        self, path: Path, tensors: dict[str, Tensor], owned: set[str], content: dict[str, Any]
    ) -> None:
        self.finish()
        temporary = path.with_name(f".{path.name}.partial")
        if self._workers.first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self._workers.barrier()
        state = self._global(tensors, owned)
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        if self._group is None:
            future: Future[Any] = Future()
            try:
                future.set_result(dcp.save(state, storage_writer=writer, no_dist=True))
            except Exception as error:
                future.set_exception(error)
        else:
            # The copy is ours: the optimiser moves the originals while the thread writes.
            future = dcp.async_save(  # type: ignore[assignment]
                {name: value.clone() for name, value in state.items()},
                storage_writer=writer,
                process_group=self._group,
            )
        self._pending = (future, temporary, path, content)

    def _commit(self, temporary: Path, path: Path, content: dict[str, Any]) -> None:
        state = {"fingerprint": self._fingerprint, "workers": self._workers.size, **content}
        write_text(temporary / "state.json", json.dumps(state, indent=2))
        sync_tree(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        if path.name.startswith("step_"):
            self._prune()

    def _own_files(self, folder: Path) -> list[Path]:
        """Files that this worker checks: every worker takes its share of them."""
        files = sorted(folder.glob("*.safetensors"))
        return files[self._workers.rank :: self._workers.size]

    def _checked(self, path: Path) -> tuple[dict[str, Any] | None, str]:
        """A checkpoint's state where all its files are whole, else why not; the same everywhere."""
        fault = ""
        state: dict[str, Any] | None = None
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            assert state is not None
            names = sorted(state["sha256"])
            for name in names[self._workers.rank :: self._workers.size]:
                if _sha256(path / name) != state["sha256"][name]:
                    fault = f"{name} is damaged"
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            fault = str(error)
        faults = [found for found in self._workers.gather_objects(fault) if found]
        if faults or state is None:
            return None, "; ".join(sorted(set(faults)))
        if state["fingerprint"] != self._fingerprint:
            raise RunError(
                f"checkpoint '{path}' was written with another configuration or other data; use "
                "another run name, or restore the configuration"
            )
        return state, ""

    def _read(
        self, path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Tensor]:
        """Tensors as this worker has them, from the parts of however many wrote them."""
        reader = dcp.HuggingFaceStorageReader(str(path))
        owned = {f"policy/{name}" for name in self._owned.weights}
        if optimizer is not None:
            owned = self._owned_names(policy, optimizer)
        rows = self._shard_rows(policy)
        state: dict[str, Any] = {}
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            shape, dtype = tuple(entry.size), entry.properties.dtype  # type: ignore[union-attr]
            if name in owned:
                local = torch.empty((rows, *shape[1:]), dtype=dtype)
                state[name] = self._distributed(local, shape)
            else:
                state[name] = torch.empty(shape, dtype=dtype)
        dcp.load(
            state,
            storage_reader=reader,
            no_dist=self._group is None,
            process_group=self._group,
        )
        return self._local(state)

    def _global(self, tensors: dict[str, Tensor], owned: set[str]) -> dict[str, Tensor]:
        """Owned rows as parts of tensors over the whole catalogue."""
        state: dict[str, Tensor] = {}
        for name, value in tensors.items():
            value = value.detach().contiguous()
            if name not in owned:
                state[name] = value
                continue
            state[name + _SHARED] = value[:1].contiguous()
            rows = value[1:].contiguous()
            state[name] = self._distributed(rows, (self._owned.total, *value.shape[1:]))
        return state

    def _local(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, value in state.items():
            if name.endswith(_SHARED):
                continue
            rows = value.to_local() if isinstance(value, DTensor) else value
            shared = state.get(name + _SHARED)
            tensors[name] = rows if shared is None else torch.cat([shared, rows])
        return tensors

    def _distributed(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self._mesh is None:
            return rows
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )

    def _owned_names(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
        """Of weights and of optimiser state with a row for each of theirs."""
        names = {f"policy/{name}" for name in self._owned.weights}
        parameters = dict(policy.named_parameters())
        mine = {id(parameters[name]) for name in self._owned.weights}
        state = optimizer.state_dict()
        groups = state["param_groups"]
        flat = [g for group in groups for g in (group if isinstance(group, list) else [group])]
        position = 0
        order: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        for group in flat:
            for _ in group["params"]:
                if id(order[position]) in mine:
                    names.update(
                        f"optimizer/{position}/{key}" for key in self._row_keys(order[position])
                    )
                position += 1
        return names

    @staticmethod
    def _row_keys(parameter: nn.Parameter) -> tuple[str, ...]:
        """State that optimisers keep by row."""
        return ("exp_avg", "exp_avg_sq", "fresh_at", "sum", "momentum_buffer")

    def _shard_rows(self, policy: nn.Module) -> int:
        state = policy.state_dict()
        return next((len(state[name]) - 1 for name in self._owned.weights), 0)

    def _paths(self) -> list[Path]:
        if not self._directory.exists():
            return []
        return sorted(
            path
            for path in self._directory.iterdir()
            if (match := _NAME.fullmatch(path.name)) and match[1] == "step"
        )

    def _prune(self) -> None:
        kept = self._paths()[-self._kept :]
        for path in self._paths()[: -self._kept]:
            shutil.rmtree(path, ignore_errors=True)
        needed = set()
        for path in kept:
            try:
                state = json.loads((path / "state.json").read_text(encoding="utf-8"))
                needed.add(f"best_{state['progression']['best_step'] or 0:012d}")
            except (OSError, KeyError, TypeError, json.JSONDecodeError):
                continue
        newest = int(kept[-1].name.removeprefix("step_")) if kept else 0
        for path in self._directory.glob("best_*"):
            # A best policy that is newer than its checkpoint waits for the next one.
            if path.name not in needed and int(path.name.removeprefix("best_")) <= newest:
                shutil.rmtree(path, ignore_errors=True)


def _fill_policy(policy: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    policy.load_state_dict(
        {k.removeprefix("policy/"): v for k, v in tensors.items() if k.startswith("policy/")}
    )


def _cause(error: BaseException) -> str:
    """The innermost reason: DCP wraps what happened on each worker."""
    failures = getattr(error, "failures", None)
    if failures:
        return "; ".join(f"{_cause(one[0])}" for one in failures.values())
    if error.__cause__ is not None:
        return _cause(error.__cause__)
    return f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Its notes on every save and load are not for a user's terminal.
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
