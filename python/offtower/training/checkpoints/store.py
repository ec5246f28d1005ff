"""Checkpoints on disk, written and read by any number of workers.

checkpoints/step_000000001234/   state.json (cursor, counters, checksums)   shard-*.safetensors
checkpoints/best_000000001200/   the same, of the policy's weights at the best validation so far

Written by torch.distributed.checkpoint as safetensors: no pickle. On several workers tensors are
copied and a thread writes them beside the training; a folder takes its name when all is there.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh

from offtower.atomic import remove_leftovers, sha256_file, sync_tree
from offtower.checksums import read_checked_json, write_checked_json
from offtower.errors import LeaseError, RunError
from offtower.run_claim import ClaimedRun
from offtower.training.checkpoints.folder import CheckpointFolder
from offtower.training.checkpoints.progression import Progression
from offtower.training.checkpoints.reading import load_state, without_group
from offtower.training.checkpoints.state import (
    Layout,
    OwnedRows,
    check_tensors,
    extra_of,
    extra_tensors,
    fill_optimizer,
    fill_policy,
    optimizer_tensors,
    owned_names,
    policy_tensors,
)
from offtower.training.workers import SINGLE_PROCESS, Workers

logger = logging.getLogger("offtower.checkpoints")


class CheckpointStore:
    """Writes, finds and reads the checkpoints of one run. Every method is collective.

    Args:
        directory: the run's `checkpoints` folder, the same storage for all workers.
        fingerprint: of the configuration and data; a checkpoint of another one is refused.
        kept: how many of the newest stay.
        workers: those that write.
        owned: tensors of which each worker has rows of its own.
        run: claimed by the first worker; its copy is sent when a checkpoint has got its name.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: str,
        kept: int,
        workers: Workers = SINGLE_PROCESS,
        owned: OwnedRows | None = None,
        run: ClaimedRun | None = None,
    ) -> None:
        self._folder = CheckpointFolder(directory, kept)
        self._fingerprint = fingerprint
        self._workers = workers
        self._run = run or ClaimedRun(directory.parent)
        self._token = workers.broadcast(self._run.token)
        self._owned = owned or OwnedRows()
        several = workers.size > 1
        # The writing thread's messages must not meet those of the training.
        self._group = dist.new_group(backend="gloo") if several else None
        mesh = DeviceMesh("cpu", list(range(workers.size))) if several else None
        self._layout = Layout(self._owned, mesh)
        self._pending: tuple[Future[Any], Path, Path, dict[str, Any]] | None = None
        self.extra: dict[str, Tensor] = {}
        """What `load_newest` found beside policy and optimizer."""
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
        """Write a checkpoint; `extra` is what else the run must have to go on.

        One worker has written it when this returns; several have begun to, and `finish` waits.

        Raises:
            RunError: this one, or one that was begun before, could not be written.
        """
        tensors = {
            **policy_tensors(policy),
            **optimizer_tensors(optimizer),
            **extra_tensors(extra or {}),
        }
        names = owned_names(self._owned, policy, optimizer)
        content = {"progression": progression.to_dict()}
        self._begin(self._folder.step(progression.step), tensors, names, content)
        if self._workers.size == 1:
            self.finish()

    def save_best(self, policy: nn.Module, step: int) -> None:
        """Keep the policy's weights.

        Raises:
            RunError: they could not be written.
        """
        names = owned_names(self._owned, policy, None)
        self._begin(self._folder.best(step), policy_tensors(policy), names, {})
        self.finish()

    def load_best(self, policy: nn.Module, step: int) -> None:
        """Fill the policy with what `save_best` kept.

        Raises:
            RunError: it is missing or damaged.
        """
        path = self._folder.best(step)
        state, fault = self._checked(path)
        if state is None:
            raise RunError(f"the best policy at '{path}' cannot be read: {fault}")
        tensors, fault = self._read(path, policy, None)
        if fault:
            raise RunError(f"the best policy at '{path}' cannot be read: {fault}")
        fill_policy(policy, tensors)

    def load_newest(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Progression | None:
        """Fill policy and optimizer from the newest readable checkpoint; None where there is none.

        Damaged checkpoints are passed over, and named in `skipped`.

        Raises:
            RunError: a checkpoint belongs to another configuration or other data.
        """
        for path in reversed(self._folder.steps()):
            state, fault = self._checked(path)
            if state is None:
                self._skip(path, fault)
                continue
            try:
                progression = Progression.from_dict(state["progression"])
            except (KeyError, TypeError) as error:
                self._skip(path, f"its progression cannot be read: {error!r}")
                continue
            best = progression.best_step
            if best is not None and self._checked(self._folder.best(best))[0] is None:
                self._skip(path, "its best policy is missing or damaged")
                continue
            tensors, fault = self._read(path, policy, optimizer)
            if fault:
                self._skip(path, fault)
                continue
            fill_policy(policy, tensors)
            fill_optimizer(optimizer, tensors)
            self.extra = extra_of(tensors)
            return progression
        return None

    def _skip(self, path: Path, fault: str) -> None:
        self.skipped.append(f"{path.name}: {fault}")
        if self._workers.first:
            logger.warning("checkpoint '%s' is skipped: %s", path, fault)

    @property
    def written(self) -> bool:
        """Whether this worker has written what `save` began; `finish` then takes no time here."""
        return self._pending is not None and self._pending[0].done()

    def finish(self) -> None:
        """Wait until what was begun is written, and has its name.

        Raises:
            RunError: it could not be written, on this or another worker; older checkpoints stay.
            LeaseError: another process took the run over.
        """
        if self._pending is None:
            return
        future, temporary, path, content = self._pending
        self._pending = None
        try:
            self._finish(future, temporary, path, content)
        except (LeaseError, RunError):
            if self._workers.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _finish(
        self, future: Future[Any], temporary: Path, path: Path, content: dict[str, Any]
    ) -> None:
        checksums: dict[str, str] = {}

        def add_checksums() -> None:
            checksums.update({f.name: sha256_file(f) for f in self._share(temporary)})

        faults = self._together(future.result) or self._together(add_checksums)
        found = self._workers.gather_objects(checksums)
        if not faults:
            content = {**content, "files": {k: v for part in found for k, v in part.items()}}
            faults = self._together(
                lambda: self._commit(temporary, path, content) if self._workers.first else None
            )
        if not faults:
            return
        # What another process removed is no full disk.
        self._together(self._run.check_owner)
        newest = self._folder.steps()
        left = f"the newest whole one is {newest[-1].name}" if newest else "there is none yet"
        raise RunError(
            f"checkpoint {path.name} could not be written ({'; '.join(faults)}); {left}. "
            f"Make room at '{self._folder.path}' and go on with --resume"
        )

    def _begin(
        self, path: Path, tensors: dict[str, Tensor], owned: set[str], content: dict[str, Any]
    ) -> None:
        self.finish()
        temporary = path.with_name(f".{path.name}.{self._token}.partial")

        def make_room() -> None:
            self._run.check_owner()
            if self._workers.first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()

        faults = self._together(make_room)
        state = self._layout.to_checkpoint(tensors, owned)
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        future: Future[Any] = Future()
        if faults:
            future.set_exception(OSError("; ".join(faults)))
        elif self._group is None:
            try:
                with without_group():
                    future.set_result(dcp.save(state, storage_writer=writer, no_dist=True))
            except (Exception, CheckpointException) as error:
                if any(isinstance(one, KeyboardInterrupt) for one in _inner(error)):
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise KeyboardInterrupt from None
                future.set_exception(error)
        else:
            # Copies, since the optimizer moves the originals while the thread writes. What came
            # from a GPU is one.
            copied = any(tensor.is_cuda for tensor in tensors.values())
            copies: dict[str, Any] = (
                state if copied else {name: value.clone() for name, value in state.items()}
            )
            begun: Any = dcp.async_save(copies, storage_writer=writer, process_group=self._group)
            future = begun
        self._pending = (future, temporary, path, content)

    def _commit(self, temporary: Path, path: Path, content: dict[str, Any]) -> None:
        state = {
            "fingerprint": self._fingerprint,
            "fencing_token": self._token,
            "workers": self._workers.size,
            **content,
        }
        write_checked_json(temporary / "state.json", state)
        sync_tree(temporary)
        self._run.check_owner()
        if path.exists():
            # A damaged one, or one of a start that a kill undid.
            shutil.rmtree(path)
        temporary.rename(path)
        if self._folder.is_checkpoint(path):
            self._folder.prune(path)
            if self._run.mirror is not None:
                self._run.mirror.push_later()

    def _together(self, work: Callable[[], object]) -> list[str]:
        """Do it on every worker; what went wrong, on any, is known to all.

        Raises:
            LeaseError: one of the workers found that another process has the run.
        """
        fault: str | None = None
        lost: LeaseError | None = None
        try:
            work()
        except LeaseError as error:
            lost = error
        except (Exception, CheckpointException) as error:
            fault = _cause(error)
        faults, found = zip(*self._workers.gather_objects((fault, lost)), strict=True)
        for one in found:
            if one is not None:
                raise one
        if self._workers.size == 1:
            return [one for one in faults if one is not None]
        return [f"worker {rank}: {one}" for rank, one in enumerate(faults) if one is not None]

    def _share(self, folder: Path) -> list[Path]:
        """Files whose checksums this worker computes."""
        files = sorted(folder.glob("*.safetensors"))
        return files[self._workers.rank :: self._workers.size]

    def _checked(self, path: Path) -> tuple[dict[str, Any] | None, str]:
        """A checkpoint's state where all its files are whole, else why not; the same everywhere."""
        fault = ""
        state: dict[str, Any] = {}
        try:
            state = read_checked_json(path / "state.json")
            names = sorted(file.name for file in path.glob("*.safetensors"))
            if names != sorted(state["files"]):
                fault = f"its files are {names}, not {sorted(state['files'])}"
            for name in names[self._workers.rank :: self._workers.size] if not fault else []:
                if sha256_file(path / name) != state["files"][name]:
                    fault = f"{name} is damaged"
        except (OSError, RunError, KeyError, TypeError) as error:
            fault = str(error)
        faults = sorted({found for found in self._workers.gather_objects(fault) if found})
        if faults:
            return None, "; ".join(faults)
        if state["fingerprint"] != self._fingerprint:
            raise RunError(
                f"checkpoint '{path}' was written with another configuration or other data; use "
                "another run name, or restore the configuration"
            )
        return state, ""

    def _read(
        self, path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> tuple[dict[str, Tensor], str]:
        """This worker's tensors, from the parts of however many wrote them, and what is wrong.

        Nothing is filled: a checkpoint that does not fit must leave policy and optimizer alone.
        """
        tensors: dict[str, Tensor] = {}

        def read() -> None:
            names = owned_names(self._owned, policy, optimizer)
            state = load_state(path, self._layout, names, self._group)
            tensors.update(self._layout.from_checkpoint(state))
            check_tensors(tensors, policy, optimizer)

        return tensors, "; ".join(self._together(read))


def _inner(error: BaseException) -> list[BaseException]:
    """What happened on each worker, unwrapped."""
    failures = getattr(error, "failures", None)
    if failures:
        return [inner for one in failures.values() for inner in _inner(one[0])]
    return [error] if error.__cause__ is None else _inner(error.__cause__)


def _cause(error: BaseException) -> str:
    said = {
        str(one) if isinstance(one, OSError) else f"{type(one).__name__}: {one}"
        for one in _inner(error)
    }
    return "; ".join(sorted(said))


# torch's notes on every save and load are not for a user's terminal. The second logger has a level
# of its own (DEBUG), so that a handler of the root logger would print every call.
for _name in ("torch.distributed.checkpoint", "c10d-NullHandler-dcp_logger"):
    logging.getLogger(_name).setLevel(logging.ERROR)
