"""The files of a lease (`offtower.data.lease`), on this machine or in a store."""

from __future__ import annotations

import inspect
import os
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs

from offtower.data.location import Location

FOLDER = ".lease"
SETTLE_SECONDS = 2.0
"""Until an owner's object is read back, in a store without a conditional put."""


class LeaseFiles(Protocol):
    """The files of a lease, on this machine or in a store."""

    remote: bool

    @property
    def place(self) -> object: ...

    def names(self) -> list[str]:
        """Names of all files; none where the folder does not exist."""

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that does not exist yet; False where it does."""

    def read(self, name: str) -> bytes: ...

    def beat(self, name: str, *, create: bool = True) -> None:
        """Renew a heartbeat; without `create` FileNotFoundError where it is gone."""

    def pulse(self, name: str) -> object:
        """What a heartbeat changes; None where it is gone."""

    def age(self, name: str) -> float:
        """Seconds since the last heartbeat by the storage's clock, 0 where it has none."""

    def remove(self, name: str) -> None: ...

    def remove_folder(self) -> None:
        """Remove the folder if it is empty."""


def open_lease_files(folder: Location) -> LeaseFiles:
    return open_exclusive_files(folder / FOLDER)


def open_exclusive_files(place: Location) -> LeaseFiles:
    """Files of a folder that one of several processes creates."""
    return StoreLeaseFiles(place) if place.local is None else LocalLeaseFiles(place.local)


class LocalLeaseFiles:
    remote = False

    def __init__(self, place: Path) -> None:
        self.place = place

    def names(self) -> list[str]:
        try:
            return os.listdir(self.place)
        except FileNotFoundError:
            return []

    def create(self, name: str, content: bytes) -> bool:
        path, beside = self.place / name, self.place / f".{uuid.uuid4().hex}"
        try:
            beside.write_bytes(content)
            os.link(beside, path)
            return True
        except FileExistsError:
            # An NFS server repeats a request whose answer was lost.
            return os.stat(beside).st_nlink == 2
        except FileNotFoundError:
            raise
        except OSError:
            return self._create_without_links(path, content)
        finally:
            beside.unlink(missing_ok=True)

    @staticmethod
    def _create_without_links(path: Path, content: bytes) -> bool:
        try:
            with open(path, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def read(self, name: str) -> bytes:
        return (self.place / name).read_bytes()

    def beat(self, name: str, *, create: bool = True) -> None:
        path = self.place / name
        if create:
            self.place.mkdir(parents=True, exist_ok=True)
            path.touch()
        os.utime(path)

    def pulse(self, name: str) -> object:
        try:
            # Opened, since NFS asks its server then.
            with open(self.place / name, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def age(self, name: str) -> float:
        probe = self.place / f".{uuid.uuid4().hex}"
        try:
            probe.touch()
            return probe.stat().st_mtime - (self.place / name).stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        (self.place / name).unlink(missing_ok=True)

    def remove_folder(self) -> None:
        self.place.rmdir()


class StoreLeaseFiles:
    remote = True

    def __init__(self, place: Location) -> None:
        self.place = place

    def names(self) -> list[str]:
        return [found.name for found in self.place.files()]

    def create(self, name: str, content: bytes) -> bool:
        location = self.place / name
        put = _conditional_put(location.filesystem)
        if put is not None:
            try:
                put(location.path, content, mode="create")
            except FileExistsError:
                return False
            return True
        if location.exists():
            return False
        location.write_bytes(content)
        time.sleep(SETTLE_SECONDS)
        return location.read_bytes() == content

    def read(self, name: str) -> bytes:
        return (self.place / name).read_bytes()

    def beat(self, name: str, *, create: bool = True) -> None:
        (self.place / name).write_bytes(uuid.uuid4().hex.encode())

    def pulse(self, name: str) -> object:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def age(self, name: str) -> float:
        probe = self.place / f"clock.{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"")
            now, then = (one.files()[0].mtime_ns for one in (probe, self.place / name))
        except (FileNotFoundError, IndexError):
            return 0.0
        finally:
            probe.remove()
        return 0.0 if now is None or then is None else (now - then) / 1e9

    def remove(self, name: str) -> None:
        (self.place / name).remove()

    def remove_folder(self) -> None:
        if not self.names():
            self.place.remove()


def _conditional_put(store: fs.FileSystem | None) -> Any:
    """fsspec's `pipe_file` where it can refuse to overwrite, else None."""
    handler = getattr(store, "handler", None)
    if not isinstance(handler, fs.FSSpecHandler):
        return None
    put = handler.fs.pipe_file
    return put if "mode" in inspect.signature(put).parameters else None
