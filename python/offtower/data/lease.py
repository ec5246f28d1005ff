"""Leases: one process at a time writes to a folder, and a superseded writer is stopped.

`FOLDER/.lease/000007.json` names the owner of fencing token 7 and never changes.
`000007.<id>.alive` is that owner's heartbeat; the owner removes it when it releases the lease.
The highest token is the current one. Whoever wants the folder creates the next token, which only
one process can do, and then removes the files of older tokens. `Lease.check` fails for every
earlier owner from then on; it is called before each write.

An owner counts as dead
- at once, where its process has ended on this machine (same boot and process namespace; the
  start time tells a reused process number apart);
- after `STALE_SECONDS` without a heartbeat, where it ran on another machine. Ages are differences
  of the storage's own timestamps, so that the clocks of hosts do not matter.

What creating a token guarantees:
- On this machine and on NFS: a hard link (exclusive creation where links are not supported) is
  atomic, so exactly one process gets a token. An NFS client may serve a listing from its attribute
  cache (up to 60 s by default); `check` therefore also opens the heartbeat, which asks the server.
- In stores behind fsspec whose `pipe_file` has mode="create" (s3fs, gcsfs, adlfs): a conditional
  put, so exactly one process gets a token.
- In other stores (pyarrow has no conditional put): the owner's object is written, and read again
  after `SETTLE_SECONDS`. The last of several writers within that time owns the token; an earlier
  one notices at its next heartbeat or before it next sends files.

Between `check` and the write that follows there is no lock: a process that is suspended exactly
there can still complete that one write. The next checkpoint of the owner removes it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from offtower.data.lease_files import FOLDER, LeaseFiles, open_lease_files
from offtower.data.location import AnyPath, Location
from offtower.errors import DataError, LeaseError

logger = logging.getLogger("offtower.lease")

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
_ATTEMPTS = 20
_FILL_SECONDS = 1.0

_OWNER = re.compile(r"([0-9]{6,})\.json")
_ID = re.compile(r"[0-9a-f]{32}")
_OLDER = re.compile(r"([0-9]{6,})\.(json|[0-9a-f]*\.alive)|\.[0-9a-f]{32}|clock\.[0-9a-f]{32}")
"""Files of a lease; nothing else in its folder is ever removed."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease.

    Attributes:
        started: start time of the process as its system counts it, empty where unknown.
        machine: boot and process namespace; equal only where process numbers can be compared.
    """

    host: str
    process: int
    started: str
    machine: str
    since: str
    id: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            socket.gethostname(),
            os.getpid(),
            _start_time(os.getpid()) or "",
            _machine(),
            datetime.now(UTC).isoformat(timespec="seconds"),
            uuid.uuid4().hex,
        )

    @classmethod
    def unknown(cls) -> Owner:
        """The owner in a file that cannot be read."""
        return cls("unknown", 0, "", "", "unknown", "")

    def is_running(self) -> bool | None:
        """Whether the process runs; None where only its heartbeat can tell."""
        if self.machine != _machine():
            return None
        started = _start_time(self.process)
        if started is None:
            return False
        if not started or not self.started:
            return None
        return started == self.started

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host} since {self.since}"


@dataclass(frozen=True)
class LeaseKey:
    """What another process needs to check the same lease (`Lease.follow`)."""

    folder: str
    token: int
    owner: Owner


class Lease:
    """The right to write to a folder; made by `acquire` or `follow`, released at the end of `with`.

    Attributes:
        interrupted: the owner before, where it died without releasing the lease.
    """

    def __init__(self, key: LeaseKey, *, owned: bool, interrupted: Owner | None = None) -> None:
        self.key, self.interrupted = key, interrupted
        self._files = open_lease_files(Location.of(key.folder))
        self._owned = owned
        self._lost: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if owned or self._files.remote:
            self._thread = threading.Thread(target=self._run, name="offtower-lease", daemon=True)
            self._thread.start()

    @classmethod
    def acquire(cls, folder: AnyPath, *, take_over: bool = False, remedy: str = "") -> Lease:
        """Become the owner of a folder; it is created where it does not exist.

        Waits for up to `STALE_SECONDS` where the owner is on another machine and has not shown
        whether it is alive.

        Args:
            take_over: become the owner even if the present one is alive.
            remedy: ends the message of the refusal.

        Raises:
            LeaseError: another process owns the folder.
            DataError: the store cannot be used.
        """
        location = Location.of(folder).absolute()
        if location.local is not None and (location.local / FOLDER).is_symlink():
            raise DataError(
                f"'{location.local / FOLDER}' is a symbolic link, but a lease writes and removes "
                "files there; remove the link"
            )
        files = open_lease_files(location)
        me = Owner.this_process()
        for _ in range(_ATTEMPTS):
            token, earlier = _current(files)
            if earlier is not None and not take_over:
                _refuse_living(files, location, token, earlier, remedy)
            mine = _heartbeat_name(token + 1, me)
            try:
                # First, since an owner without a heartbeat has released its lease.
                files.beat(mine)
                if files.create(_owner_name(token + 1), json.dumps(asdict(me)).encode()):
                    _remove_older(files, token + 1)
                    key = LeaseKey(str(location), token + 1, me)
                    return cls(key, owned=True, interrupted=earlier)
                files.remove(mine)
            except FileNotFoundError:
                continue  # An owner that ended removed the folder.
        raise LeaseError(f"'{location}' could not be claimed: its owner changes all the time")

    @classmethod
    def follow(cls, key: LeaseKey) -> Lease:
        """The lease of another process, for one that writes on its behalf."""
        return cls(key, owned=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    @property
    def token(self) -> int:
        return self.key.token

    def check(self) -> None:
        """Raise where the lease is lost. In a store this is what the last heartbeat found.

        Raises:
            LeaseError: another process took over, or the folder was removed.
        """
        if self._files.remote:
            if self._lost is not None:
                raise LeaseError(self._lost)
        else:
            self.verify()

    def verify(self) -> None:
        """Ask the storage whether the lease is lost, also in a store.

        Raises:
            LeaseError: as `check`.
            DataError: the store does not answer.
        """
        if self._lost is None:
            self._lost = self._fault()
        if self._lost is not None:
            raise LeaseError(self._lost)

    def release(self, *, remove: bool = False) -> None:
        """Let others have the folder.

        Args:
            remove: remove the lease's files too, where nobody has claimed the folder since.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if not self._owned:
            return
        self._owned = False
        with contextlib.suppress(OSError, DataError):
            if remove and self._fault() is None:
                self._files.remove(_owner_name(self.token))
            self._files.remove(_heartbeat_name(self.token, self.key.owner))
            if remove:
                self._files.remove_folder()

    def _fault(self) -> str | None:
        token, owner, names = self.token, self.key.owner, self._files.names()
        newest = _newest(names)
        if newest is not None and newest > token:
            return self._taken(_owner_of(self._files, newest))
        if newest is None or newest < token:
            return f"'{self.key.folder}' was removed while {owner} wrote to it; this process stops"
        if self._files.remote:
            found = _owner_of(self._files, token)
            return None if found.id == owner.id else self._taken(found)
        if self._files.pulse(_heartbeat_name(token, owner)) is None:
            return self._taken("another process")
        return None

    def _taken(self, by: object) -> str:
        return (
            f"'{self.key.folder}' was taken over by {by}. This process ({self.key.owner}) stops "
            "and writes nothing more there"
        )

    def _run(self) -> None:
        """Show that the owner is alive; in a store also look whether it still is the owner."""
        mine = _heartbeat_name(self.token, self.key.owner)
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if self._files.remote:
                    self.verify()
                if self._owned:
                    self._files.beat(mine, create=self._files.remote)
            except LeaseError:
                return
            except FileNotFoundError:
                return  # Taken over: `check` says so.
            except (OSError, DataError) as error:
                logger.warning("no heartbeat for '%s': %s", self.key.folder, error)


def _refuse_living(
    files: LeaseFiles, location: Location, token: int, owner: Owner, remedy: str
) -> None:
    """Return once the owner is known to be dead.

    Raises:
        LeaseError: it is alive.
    """
    if not owner.id:
        owner = _await_owner(files, token)
    running = owner.is_running()
    if running is False:
        return
    if running is None and _is_stale(files, token, owner):
        return
    raise LeaseError(
        f"'{location}' is being written by {owner}. Wait for it to end, or stop it" + remedy
    )


def _await_owner(files: LeaseFiles, token: int) -> Owner:
    """The owner, once the process that created its file has filled it; unknown after a second.

    Where links are not supported, the file is empty for a moment after its creation.
    """
    deadline = time.monotonic() + _FILL_SECONDS
    while not (owner := _owner_of(files, token)).id and time.monotonic() < deadline:
        time.sleep(0.02)
    return owner


def _is_stale(files: LeaseFiles, token: int, owner: Owner) -> bool:
    """Whether the heartbeat has been missing for STALE_SECONDS, waiting for that long at most."""
    name = _heartbeat_name(token, owner) if owner.id else _owner_name(token)
    before = files.pulse(name)
    left = STALE_SECONDS - files.age(name)
    if before is None or left <= 0:
        return True
    logger.warning(
        "'%s' belongs to %s, which may be dead: waiting up to %.0f s for a heartbeat",
        files.place,
        owner,
        left,
    )
    deadline = time.monotonic() + left
    while time.monotonic() < deadline:
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        if files.pulse(name) != before:
            return files.pulse(name) is None  # Released, or beaten.
        if not owner.id and _owner_of(files, token).id:
            return False  # Filled late, by a process that is alive.
    return True


def _current(files: LeaseFiles) -> tuple[int, Owner | None]:
    """The highest token, 0 without one, and its owner unless that released it."""
    names = files.names()
    token = _newest(names)
    if token is None:
        return 0, None
    owner = _owner_of(files, token)
    held = not owner.id or _heartbeat_name(token, owner) in names
    return token, owner if held else None


def _owner_of(files: LeaseFiles, token: int) -> Owner:
    try:
        owner = Owner(**json.loads(files.read(_owner_name(token))))
    except (OSError, TypeError, ValueError, RecursionError):
        return Owner.unknown()
    texts = (owner.host, owner.started, owner.machine, owner.since, owner.id)
    fits = type(owner.process) is int and all(isinstance(text, str) for text in texts)
    return owner if fits and _ID.fullmatch(owner.id) else Owner.unknown()


def _newest(names: list[str]) -> int | None:
    tokens = [int(found[1]) for name in names if (found := _OWNER.fullmatch(name))]
    return max(tokens, default=None)


def _remove_older(files: LeaseFiles, token: int) -> None:
    for name in files.names():
        found = _OLDER.fullmatch(name)
        if found and (found[1] is None or int(found[1]) < token):
            with contextlib.suppress(OSError, DataError):
                files.remove(name)


def _owner_name(token: int) -> str:
    return f"{token:06d}.json"


def _heartbeat_name(token: int, owner: Owner) -> str:
    return f"{token:06d}.{owner.id}.alive"


def _machine() -> str:
    """Boot and process namespace of this process; the host's name where the system has neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_time(process: int) -> str | None:
    """When a process started; empty where the system does not say, None where it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # Fields 3 (state) and 22 (start time) of proc(5); a zombie has ended.
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
