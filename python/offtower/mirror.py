"""A copy of a run directory in an object store, from which another machine can resume.

Any file system of pyarrow: s3://, gs://, abfs://, hdfs://, file://.
"""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Self

from pyarrow import fs

from offtower.atomic import sync_directory, sync_tree
from offtower.data.lease import Lease
from offtower.data.location import Location
from offtower.errors import DataError, LeaseError, RunError
from offtower.paths import redact, safe_relative
from offtower.run_directory import FETCHED

logger = logging.getLogger("offtower.mirror")

_NOT_COPIED = ("items", "ray")
"""Folders that are not copied: encoded features of earlier versions, files of a job."""
_LAST = ("state.json", "checksums.json", "manifest.json", "CURRENT")
"""Files that state that others are complete; they are sent after them."""
_CONFIG = "config.yaml"


class Mirror:
    """Sends changes in a thread, so that training does not wait for the network.

    Nothing is sent without a lease on the copy. Where the store did not answer when the run began,
    the first transfer that reaches it acquires the lease.

    Args:
        uri: folder of the copies of all runs; the copy has the name of the run.
        run: the local run directory.

    Raises:
        RunError: the address has an unknown form, or its store cannot be reached.
    """

    def __init__(self, uri: str, run: Path) -> None:
        self.uri, self._run = uri.rstrip("/"), run
        try:
            there = Location.of(uri)
        except DataError as error:
            raise RunError(f"--mirror '{redact(uri)}' cannot be used: {error}") from error
        self._there = there.filesystem or fs.LocalFileSystem()
        self._place = there / run.name
        self._base = self._place.path
        self.lease: Lease | None = None
        self._take_over, self._remedy = False, ""
        self._refused: LeaseError | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="offtower-mirror")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self.lease is not None:
            self.lease.release()

    def acquire(self, *, take_over: bool, remedy: str) -> None:
        """Claim the copy, see `Lease.acquire`; a store that does not answer is asked again later.

        Raises:
            LeaseError: another process owns the copy.
        """
        self._take_over, self._remedy = take_over, remedy
        try:
            self._claim()
        except (OSError, DataError) as error:
            logger.warning("the copy at '%s' cannot be claimed yet: %s", self.uri, error)

    def check_owner(self) -> None:
        """Raise where another process has taken over the copy, as the last transfer found it.

        Raises:
            LeaseError: it has.
        """
        if self._refused is not None:
            raise self._refused
        if self.lease is not None:
            self.lease.check()

    def _claim(self) -> None:
        if self.lease is None:
            self.lease = Lease.acquire(self._place, take_over=self._take_over, remedy=self._remedy)

    def pull(self) -> bool:
        """Fetch the copy if there is no local run; return whether it was fetched.

        Raises:
            RunError: it cannot be read, or lists a file outside of its folder.
        """
        if (self._run / _CONFIG).exists():
            return False
        try:
            found = self._there.get_file_info(
                fs.FileSelector(self._base, recursive=True, allow_not_found=True)
            )
            files = {
                safe_relative(self._name(info.path), redact(self.uri), RunError): info.path
                for info in found
                if info.type == fs.FileType.File
            }
            if _CONFIG not in files:
                return False
            fetched = self._run / FETCHED
            for name, path in files.items():
                if name.startswith("."):
                    continue
                target = fetched / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._there.open_input_stream(path) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
            self._move_in(fetched)
        except OSError as error:
            raise RunError(f"the copy at '{self.uri}' cannot be read: {error}") from error
        return True

    def _move_in(self, fetched: Path) -> None:
        """Move what was fetched to its place. A kill leaves `fetched`, and the next start removes
        what was moved and fetches again."""
        sync_tree(fetched)
        for path in sorted(fetched.iterdir(), key=lambda path: path.name == _CONFIG):
            os.replace(path, self._run / path.name)
        sync_directory(self._run)
        fetched.rmdir()

    def push_later(self) -> None:
        """Start to send what has changed, and what an earlier transfer failed to send.

        Raises:
            LeaseError: another process owns the copy.
        """
        self.check_owner()
        if self._pending is not None and not self._pending.done():
            return
        self._report(self._pending)
        self._pending = self._thread.submit(self._push)

    def close(self) -> None:
        """Send the rest and wait for it.

        Raises:
            RunError: it could not be sent; the local run is complete.
        """
        if self._pending is not None:
            self._pending.exception()
            self._report(self._pending)
        last = self._thread.submit(self._push)
        self._thread.shutdown(wait=True)
        error = last.exception()
        self.check_owner()
        if error is not None:
            raise RunError(
                f"the run at '{self._run}' is complete, but its copy at '{self.uri}' is not: "
                f"{error}. The same command with --resume sends the rest"
            ) from error

    def _report(self, done: Future[None] | None) -> None:
        error = None if done is None else done.exception()
        if error is not None:
            logger.warning("copying to '%s' failed and is retried later: %s", self.uri, error)

    def _push(self) -> None:
        try:
            self._claim()
            self._send_changes()
        except LeaseError as error:
            self._refused = error
            raise

    def _send_changes(self) -> None:
        assert self.lease is not None
        self.lease.verify()
        now = self._local_files()
        # _LAST files follow the files they describe, and removals come last, so that the copy can
        # be resumed from at any time.
        order = sorted(now, key=lambda name: (PurePosixPath(name).name in _LAST, name))
        for name in order:
            if self._sent.get(name) == now[name]:
                continue
            if PurePosixPath(name).name in _LAST:
                self.lease.verify()
            try:
                self._send(name)
            except FileNotFoundError:
                continue  # Removed meanwhile, as old checkpoints are.
            self._sent[name] = now[name]
        for name in set(self._sent) - set(now):
            self._there.delete_file(f"{self._base}/{name}")
            del self._sent[name]

    def _local_files(self) -> dict[str, tuple[int, int]]:
        """Return size and mtime of every file that the copy should have."""
        found: dict[str, tuple[int, int]] = {}
        for folder, folders, files in os.walk(self._run):
            place = Path(folder).relative_to(self._run)
            folders[:] = [
                name
                for name in folders
                if not name.startswith(".") and (place.parts or name not in _NOT_COPIED)
            ]
            for name in files:
                if name.startswith("."):
                    continue
                try:
                    facts = (Path(folder) / name).stat()
                except FileNotFoundError:
                    continue
                found[(place / name).as_posix()] = (facts.st_size, facts.st_mtime_ns)
        return found

    def _send(self, name: str) -> None:
        target = f"{self._base}/{name}"
        with open(self._run / name, "rb") as source:
            self._there.create_dir(str(PurePosixPath(target).parent), recursive=True)
            with self._there.open_output_stream(target) as sink:
                shutil.copyfileobj(source, sink, 1 << 20)

    def _name(self, path: str) -> str:
        return path.removeprefix(self._base).lstrip("/")
