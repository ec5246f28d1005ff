"""A local cache of files in object stores, for files that are read repeatedly or memory-mapped.

All processes of a machine share the folder OFFTOWER_CACHE (default ~/.cache/offtower) of at most
OFFTOWER_CACHE_GIB GiB (default 100). The key of a copy is its address, size and time of change.
Copies appear atomically; the least recently used one that is not open is evicted first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from offtower.atomic import remove_leftovers, replace_directory, write_text
from offtower.data.location import ListedFile
from offtower.data.read_ahead import ParallelReadAhead
from offtower.data.stores import limit, retry
from offtower.errors import DataError

logger = logging.getLogger("offtower.stores")

FOLDER, GIB = "OFFTOWER_CACHE", "OFFTOWER_CACHE_GIB"
SPARE_BYTES = 2**30
"""Disk space that copies leave free."""
_RANGE = 16 * 2**20
_THREADS = 8
_LOG_ABOVE = 256 * 2**20
_DATA, _LOCK, _ORIGIN = "data", "lock", "origin.json"


class LocalCopies:
    """Local paths of files. A pickled object uses the cache of the machine that loads it."""

    def __init__(self, files: Sequence[ListedFile]) -> None:
        self._files = list(files)
        self._paths: list[Path] | None = None
        self._held: list[IO[bytes]] = []

    def __len__(self) -> int:
        return len(self._files)

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files, "_paths": None, "_held": []}

    def name(self, number: int) -> str:
        """Return the path or address that the user knows."""
        return str(self._files[number].location)

    def path(self, number: int) -> Path:
        """Return the local path; the first call copies all files.

        Raises:
            DataError: a file has changed or cannot be read, or the cache is full.
        """
        if self._paths is None:
            far = [one for one in self._files if one.location.local is None]
            copies = iter(_open_copies(far, self._held)) if far else iter(())
            self._paths = [
                next(copies) if one.location.local is None else one.location.local
                for one in self._files
            ]
        return self._paths[number]


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


def _open_copies(files: Sequence[ListedFile], held: list[IO[bytes]]) -> list[Path]:
    """Return paths of copies; `held` gets open files that protect them from eviction."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            entries = [folder / _key(one) for one in files]
            missing: list[tuple[ListedFile, Path]] = []
            for one, entry in zip(files, entries, strict=True):
                if (entry / _DATA).exists():
                    held.append(_share(entry))
                elif entry not in [place for _, place in missing]:
                    missing.append((one, entry))
            if missing:
                remove_leftovers(folder)
                _make_room(folder, sum(one.size for one, _ in missing))
                _copy(missing, folder)
                held += [_share(entry) for _, entry in missing]
    except OSError as error:
        raise DataError(
            f"copies of '{files[0].location}' cannot be kept in '{folder}' ({error}); "
            f"{FOLDER}=FOLDER in the environment names another place"
        ) from error
    return [entry / _DATA for entry in entries]


def _key(one: ListedFile) -> str:
    text = f"{one.location}\n{one.size}\n{one.mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the cache's lock: one process at a time copies and evicts."""
    began, logged = time.monotonic(), False
    with open(folder / _LOCK, "ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not logged and time.monotonic() - began > 15.0:
                    logged = True
                    logger.warning("waiting for another process that copies into '%s'", folder)
                time.sleep(0.05)
        yield


def _share(entry: Path) -> IO[bytes]:
    """Mark a copy as used while the returned file is open."""
    os.utime(entry / _LOCK)
    lock = open(entry / _LOCK, "rb")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def _make_room(folder: Path, wanted: int) -> None:
    """Evict closed copies, least recently used first, until `wanted` bytes fit."""
    most = cache_bytes()
    entries = [entry for entry in folder.iterdir() if (entry / _DATA).exists()]
    entries.sort(key=lambda entry: (entry / _LOCK).stat().st_mtime_ns)
    sizes = {entry: (entry / _DATA).stat().st_size for entry in entries}

    def fits() -> bool:
        free = shutil.disk_usage(folder).free
        return sum(sizes.values()) + wanted <= most and wanted + SPARE_BYTES <= free

    for entry in entries:
        if fits():
            return
        with open(entry / _LOCK, "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(entry)
            del sizes[entry]
    if fits():
        return
    free = shutil.disk_usage(folder).free
    raise DataError(
        f"no room for copies of {_gib(wanted)} in '{folder}': its limit is {_gib(most)} "
        f"({GIB}), {_gib(sum(sizes.values()))} of it are in use, and the disk has {_gib(free)} "
        f"free, of which {_gib(SPARE_BYTES)} stay free. Raise the limit, or set {FOLDER} to a "
        "folder on a larger disk"
    )


def _copy(missing: Sequence[tuple[ListedFile, Path]], folder: Path) -> None:
    wanted = sum(one.size for one, _ in missing)
    if wanted > _LOG_ABOVE:
        logger.warning(
            "copying %s ('%s'%s) to '%s', once for this machine",
            _gib(wanted),
            missing[0][0].location,
            "" if len(missing) == 1 else f" and {len(missing) - 1} more",
            folder,
        )
    parts = [
        (one, start, min(_RANGE, one.size - start))
        for one, _ in missing
        for start in range(0, one.size, _RANGE)
    ]
    blocks = ParallelReadAhead(
        lambda part: _range(*part),
        parts,
        _THREADS,
        lambda part: f"bytes {part[1]:,} to {part[1] + part[2]:,} of '{part[0].location}'",
        limit(),
        size=lambda part: part[2],
        room=_THREADS * _RANGE,
    )
    done, logged = 0, time.monotonic()
    for one, entry in missing:
        with replace_directory(entry) as temporary:
            with open(temporary / _DATA, "wb") as sink:
                for _ in range(0, one.size, _RANGE):
                    done += sink.write(next(blocks))
                    if time.monotonic() - logged > 60.0:
                        logged = time.monotonic()
                        logger.warning("copied %s of %s", _gib(done), _gib(wanted))
            (temporary / _LOCK).touch()
            write_text(temporary / _ORIGIN, json.dumps({"address": str(one.location)}) + "\n")


def _range(one: ListedFile, start: int, length: int) -> bytes:
    """Read a range of a file, which must have the size that was listed."""
    file = one.location

    def read() -> bytes:
        with file.open() as source:
            if source.size() != one.size:
                raise DataError(
                    f"'{file}' changed while it was copied (from {one.size:,} to "
                    f"{source.size():,} bytes); start again when no process writes there"
                )
            block: bytes = source.read_at(length, start)
        if len(block) != length:
            raise OSError(f"{len(block)} of {length} bytes came")
        return block

    try:
        return retry(read, f"'{file}'")
    except (pa.ArrowException, OSError) as error:
        file.refuse(error, "copied")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3g} GiB"
