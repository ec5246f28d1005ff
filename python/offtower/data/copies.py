"""Copies of files in object stores, for files that are read repeatedly or memory-mapped.

They are entries of the machine's cache (`offtower.data.node_cache`). The key of a copy is its
address, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from offtower.atomic import write_text
from offtower.data.location import ListedFile
from offtower.data.node_cache import (
    FOLDER,
    Entry,
    building,
    cache_folder,
    gib,
    make_room,
    new_entry,
    open_entry,
)
from offtower.data.read_ahead import ParallelReadAhead
from offtower.data.stores import limit, retry
from offtower.errors import DataError

logger = logging.getLogger("offtower.stores")

_RANGE = 16 * 2**20
_THREADS = 8
_LOG_ABOVE = 256 * 2**20
_DATA, _ORIGIN = "data", "origin.json"


class LocalCopies:
    """Local paths of files. A pickled object uses the cache of the machine that loads it."""

    def __init__(self, files: Sequence[ListedFile]) -> None:
        self._files = list(files)
        self._paths: list[Path] | None = None
        self._held: list[Entry] = []

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


def _open_copies(files: Sequence[ListedFile], held: list[Entry]) -> list[Path]:
    """Return paths of copies; `held` gets their entries."""
    try:
        found = {_key(one): open_entry(_key(one)) for one in files}
        if None in found.values():
            with building() as folder:
                # Another process may have copied some meanwhile.
                found |= {key: open_entry(key) for key, one in found.items() if one is None}
                missing = {_key(one): one for one in files if found[_key(one)] is None}
                if missing:
                    make_room(folder, sum(one.size for one in missing.values()), "copies")
                    _copy(list(missing.values()), folder)
                    found |= {key: open_entry(key) for key in missing}
    except OSError as error:
        raise DataError(
            f"copies of '{files[0].location}' cannot be kept in '{cache_folder()}' ({error}); "
            f"{FOLDER}=FOLDER in the environment names another place"
        ) from error
    entries = {key: one for key, one in found.items() if one is not None}
    held += entries.values()
    return [entries[_key(one)].path / _DATA for one in files]


def _key(one: ListedFile) -> str:
    text = f"{one.location}\n{one.size}\n{one.mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _copy(missing: Sequence[ListedFile], folder: Path) -> None:
    wanted = sum(one.size for one in missing)
    if wanted > _LOG_ABOVE:
        logger.warning(
            "copying %s ('%s'%s) to '%s', once for this machine",
            gib(wanted),
            missing[0].location,
            "" if len(missing) == 1 else f" and {len(missing) - 1} more",
            folder,
        )
    parts = [
        (one, start, min(_RANGE, one.size - start))
        for one in missing
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
    for one in missing:
        with new_entry(folder, _key(one)) as temporary:
            with open(temporary / _DATA, "wb") as sink:
                for _ in range(0, one.size, _RANGE):
                    done += sink.write(next(blocks))
                    if time.monotonic() - logged > 60.0:
                        logged = time.monotonic()
                        logger.warning("copied %s of %s", gib(done), gib(wanted))
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
