"""Atomic creation of files and folders, on this machine and in stores.

On this machine files and folders are written beside and renamed. Stores have no rename: a marker
(`manifest.WRITING`) is written first and the manifest last. Readers refuse a folder with the marker
and without a manifest as incomplete.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from offtower.atomic import replace_directory, replace_file
from offtower.data.location import Location
from offtower.data.manifest import WRITING, is_unfinished
from offtower.errors import DataError


def check_new(directory: Location) -> None:
    """Refuse an existing folder.

    Raises:
        DataError: it exists.
    """
    if directory.local is not None:
        if not directory.exists():
            return
    elif not (names := [one.name for one in directory.files()]):
        return
    elif is_unfinished(names):
        raise DataError(
            f"'{directory}' holds an output that was not finished ('{WRITING}' says who began it "
            "and when); if nobody is writing it now, remove the folder, or choose another"
        )
    raise DataError(f"'{directory}' exists already; choose another folder or remove it")


@contextmanager
def new_directory(directory: Location) -> Iterator[Location]:
    """Yield the location of a new folder, to write its files and last the manifest.

    If the block fails, its files are removed, in a store as far as possible.

    Raises:
        DataError: the folder exists, or another writer left it unfinished.
    """
    check_new(directory)
    if directory.local is not None:
        with replace_directory(directory.local) as temporary:
            yield Location.of(temporary)
        return
    marker = directory / WRITING
    begun = {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
    }
    marker.write_bytes((json.dumps(begun) + "\n").encode())
    try:
        yield directory
    except BaseException:
        # The marker is removed last, so that files that cannot be removed stay marked.
        with contextlib.suppress(Exception):
            for one in directory.files():
                if one.location != marker:
                    one.location.remove()
            marker.remove()
            directory.remove()
        raise
    marker.remove()


@contextmanager
def new_file(file: Location) -> Iterator[Path]:
    """Yield a path to write to; at the end the file appears at its location atomically."""
    if file.local is not None:
        with replace_file(file.local) as temporary:
            yield temporary
        return
    # A stream to a store would keep half a file on failure, and could not be retried.
    with tempfile.TemporaryDirectory(prefix="offtower-") as folder:
        path = Path(folder) / file.name
        yield path
        file.send(path)
