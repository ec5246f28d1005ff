"""Claiming a run: one process writes to a run directory and to its copy in a store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from offtower.config import Config
from offtower.data.lease import Lease, LeaseKey
from offtower.data.lease_files import FOLDER
from offtower.errors import ConfigError, OfftowerError
from offtower.mirror import Mirror
from offtower.run_directory import RunDirectory

_REMEDY = ". --take-over goes on in its place; the other process then stops at its next write"


@dataclass(frozen=True)
class ClaimKey:
    """What a process on another machine needs to write to a claimed run (`join_run`)."""

    path: str
    lease: LeaseKey
    mirror: str | None
    mirror_lease: LeaseKey | None


class ClaimedRun(RunDirectory):
    """A run directory that this process, or the one that it works for, may write to.

    Args:
        lease: None on a worker that writes nothing but its share of checkpoints.
        mirror: the copy that is kept.
    """

    def __init__(
        self, path: str | Path, lease: Lease | None = None, mirror: Mirror | None = None
    ) -> None:
        super().__init__(path)
        self.lease, self.mirror = lease, mirror

    @property
    def token(self) -> int:
        """Fencing token: it rises from owner to owner."""
        return 0 if self.lease is None else self.lease.token

    @property
    def key(self) -> ClaimKey:
        assert self.lease is not None, "the process that claimed the run has its lease"
        mirror, lease = self.mirror, None if self.mirror is None else self.mirror.lease
        return ClaimKey(
            str(self.path.absolute()),
            self.lease.key,
            None if mirror is None else mirror.uri,
            None if lease is None else lease.key,
        )

    def check_owner(self) -> None:
        """Raise where another process has taken over the run or its copy.

        Raises:
            LeaseError: it has; nothing may be written.
        """
        if self.lease is not None:
            self.lease.check()
        if self.mirror is not None:
            self.mirror.check_owner()


@contextmanager
def claim_run(
    config: Config, *, resume: bool = False, take_over: bool = False, mirror: str | None = None
) -> Iterator[ClaimedRun]:
    """Hold the directory of a run, and its copy, until the end of the block.

    A new run that ends with an error for users before it has written anything leaves no directory;
    encodings count as nothing where the configuration is to blame, which another run will have.

    Args:
        resume: accept a directory that holds a run of this configuration.
        take_over: as `resume`, and claim it even if its owner is alive.
        mirror: address of the folder of copies; a run that is not here is fetched from there.

    Raises:
        RunError: see `RunDirectory.check`, or the mirror cannot be used.
        LeaseError: another process owns the run.
    """
    resume = resume or take_over
    path = config.run_directory
    RunDirectory(path).check(config, resume=resume)
    with ExitStack() as held:
        lease = held.enter_context(Lease.acquire(path, take_over=take_over, remedy=_REMEDY))
        copy = None
        try:
            if mirror is not None:
                copy = held.enter_context(Mirror(mirror, path))
                copy.acquire(take_over=take_over, remedy=_REMEDY)
                if resume:
                    RunDirectory(path).remove_half_fetched()
                    copy.pull()
            run = ClaimedRun(path, lease, copy)
            run.start(config, resume=resume)
            yield run
        except OfftowerError as error:
            _remove_unused(path, lease, encodings=isinstance(error, ConfigError) and not resume)
            raise


@contextmanager
def join_run(key: ClaimKey) -> Iterator[ClaimedRun]:
    """Write to a run that another process has claimed; it keeps the claim alive."""
    with ExitStack() as held:
        lease = held.enter_context(Lease.follow(key.lease))
        mirror = None
        if key.mirror is not None:
            mirror = held.enter_context(Mirror(key.mirror, Path(key.path)))
            if key.mirror_lease is not None:
                mirror.lease = held.enter_context(Lease.follow(key.mirror_lease))
        yield ClaimedRun(key.path, lease, mirror)


def _remove_unused(path: Path, lease: Lease, *, encodings: bool) -> None:
    """Remove a run of which nothing but the claim was written, and its encodings if asked to."""
    run = RunDirectory(path)
    written = {FOLDER, run.config_path.name} | ({run.encodings.name} if encodings else set())
    try:
        lease.verify()
        if set(os.listdir(path)) <= written:
            shutil.rmtree(run.encodings, ignore_errors=True)
            run.config_path.unlink(missing_ok=True)
            lease.release(remove=True)
            path.rmdir()
    except (OSError, OfftowerError):
        pass  # Another process has it by now.
