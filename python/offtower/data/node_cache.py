"""Files that all processes of a machine share, in one folder of bounded size.

The folder is OFFTOWER_CACHE (default ~/.cache/offtower), at most OFFTOWER_CACHE_GIB GiB (default
100). It holds copies of files of object stores (`offtower.data.copies`), ids of catalogues with
their index (`offtower.data.shared_values`), and encoded features (`offtower.models.items`). Each
entry is a folder named by a key of its content, and appears by a rename when it is whole.

Two locks (flock, which ends with its process): `lock` is held for moments, to open and to evict;
`building` while an entry is written, so that of several processes that need it one writes it and
the others wait. What a killed writer left is removed by the next one. An open entry holds a shared
lock of its own; the least recently opened entry without one is evicted first.

Built entries have checksums. The process that opens an entry first after the machine's start, or
after a change of a file's size, time or inode, compares them; a damaged entry is built again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from offtower.atomic import remove_leftovers, replace_directory, write_text
from offtower.checksums import verify_directory, write_checksums
from offtower.errors import DataError, RunError

logger = logging.getLogger("offtower.stores")

FOLDER, GIB = "OFFTOWER_CACHE", "OFFTOWER_CACHE_GIB"
SPARE_BYTES = 2**30
"""Disk space that entries leave free."""
SHARE_ABOVE = 2**26
"""Ids with their index, and encoded features, of more bytes are shared; each process holds smaller
ones itself."""
LOCK = "lock"
_BUILDING, _VERIFIED = "building", "verified.json"
_LOG_AFTER = 15.0


class CacheFullError(DataError):
    """The cache has no room for an entry."""


class Entry:
    """An entry of the cache; it is not evicted while this object lives.

    Attributes:
        path: folder of its files, which are read-only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        os.utime(path / LOCK)
        self._lock: IO[bytes] = open(path / LOCK, "rb")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_SH)


def cache_folder() -> Path:
    """Return the folder of the cache."""
    given = os.environ.get(FOLDER)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offtower"


def cache_bytes() -> int:
    """Return the size limit of the cache.

    Raises:
        DataError: OFFTOWER_CACHE_GIB is not a valid number.
    """
    text = os.environ.get(GIB, "100")
    try:
        size = float(text) * 2**30
    except ValueError:
        size = -1.0
    if not 0 <= size < 2**63:
        raise DataError(f"{GIB}='{text}' must be a number of GiB")
    return int(size)


def open_entry(key: str) -> Entry | None:
    """Open an entry, whose files are not verified; None where there is none."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, LOCK):
        return Entry(folder / key) if (folder / key / LOCK).exists() else None


def verified_entry(key: str) -> Entry | None:
    """Open an entry whose checksums were compared since the machine started; None where there is
    none."""
    entry = open_entry(key)
    return entry if entry is not None and _is_verified(entry.path) else None


@contextmanager
def building() -> Iterator[Path]:
    """Hold the lock of writers; yields the cache's folder, without leftovers."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, _BUILDING):
        remove_leftovers(folder)
        yield folder


@contextmanager
def new_entry(folder: Path, key: str) -> Iterator[Path]:
    """Yield a folder to write; it becomes the entry. Call within `building`."""
    with replace_directory(folder / key) as temporary:
        yield temporary
        (temporary / LOCK).touch()


def make_room(folder: Path, wanted: int, what: str) -> None:
    """Evict closed entries, least recently opened first, until `wanted` bytes fit. Call within
    `building`.

    Args:
        what: that is written, for messages.

    Raises:
        CacheFullError: they do not fit.
    """
    most = cache_bytes()
    with _locked(folder, LOCK):
        entries = [entry for entry in folder.iterdir() if (entry / LOCK).exists()]
        entries.sort(key=lambda entry: (entry / LOCK).stat().st_mtime_ns)
        sizes = {entry: _size(entry) for entry in entries}

        def fits() -> bool:
            free = shutil.disk_usage(folder).free
            return sum(sizes.values()) + wanted <= most and wanted + SPARE_BYTES <= free

        for entry in entries:
            if fits():
                return
            with open(entry / LOCK, "rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                shutil.rmtree(entry)
                del sizes[entry]
        if fits():
            return
    free = shutil.disk_usage(folder).free
    raise CacheFullError(
        f"no room for {what} of {gib(wanted)} in '{folder}': its limit is {gib(most)} "
        f"({GIB}), {gib(sum(sizes.values()))} of it are in use, and the disk has {gib(free)} "
        f"free, of which {gib(SPARE_BYTES)} stay free. Raise the limit, or set {FOLDER} to a "
        "folder on a larger disk"
    )


def built_entry(key: str, size: int, build: Callable[[Path], None], what: str) -> Entry | None:
    """Open an entry, built by one process of this machine where it is missing or damaged.

    Args:
        key: of the content.
        size: bytes that it needs, about.
        build: writes its files to a folder.
        what: it is, for messages.

    Returns:
        None, with a warning, where the cache cannot hold it; the caller then keeps what it needs
        in its own memory.
    """
    try:
        found = verified_entry(key)
        if found is not None:
            return found
        with building() as folder:
            entry = open_entry(key)
            if entry is not None and _is_intact(entry.path, what):
                return entry
            if entry is not None:
                shutil.rmtree(entry.path)  # Who has it open keeps its files.
            make_room(folder, size, what)
            with new_entry(folder, key) as temporary:
                build(temporary)
                write_checksums(temporary)
            _note_verified(folder / key)
            return open_entry(key)
    except (OSError, CacheFullError) as error:
        logger.warning("%s: not shared with other processes of this machine: %s", what, error)
        return None


def gib(size: float) -> str:
    return f"{size / 2**30:,.3g} GiB"


def _is_intact(path: Path, what: str) -> bool:
    """Whether an entry's files match their checksums."""
    if _is_verified(path):
        return True
    try:
        verify_directory(path, "it is built again")
    except RunError as error:
        logger.warning("%s: %s", what, error)
        return False
    _note_verified(path)
    return True


def _is_verified(path: Path) -> bool:
    try:
        noted = json.loads((path / _VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(noted and noted == _state(path))


def _note_verified(path: Path) -> None:
    write_text(path / _VERIFIED, json.dumps(_state(path)) + "\n")


def _state(path: Path) -> list[object]:
    """What tells that no file was changed since they were verified; empty where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return []
    names = sorted(set(os.listdir(path)) - {LOCK, _VERIFIED})
    facts = [(name, (path / name).stat()) for name in names if not name.startswith(".")]
    return [boot, *([name, s.st_size, s.st_mtime_ns, s.st_ino] for name, s in facts)]


def _size(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.iterdir() if file.is_file())


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    began, logged = time.monotonic(), False
    with open(folder / name, "ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not logged and time.monotonic() - began > _LOG_AFTER:
                    logged = True
                    logger.warning("waiting for another process that writes to '%s'", folder)
                time.sleep(0.05)
        yield
