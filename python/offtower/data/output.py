"""New files and folders that are whole, or not there, or say that they are not whole.

On this machine what is written takes its name by a rename. A store has none: files take their
final names one by one, a marker (`manifest.WRITING`) comes first and the manifest last. A folder
with the marker and without a manifest is incomplete, and readers refuse it.
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
    """Refuse a folder that is there already.

    Raises:
        DataError: it is.
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
    """Yield where to write the files of a new folder, the manifest last; see the module.

    If the block fails, what it wrote is removed; in a store as far as that still works.

    Raises:
        DataError: the folder exists, or holds what another writer left.
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
        # The marker goes last: what cannot be removed stays marked.
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
    """Yield a path to write to; at the end the file is in its place, whole or not at all."""
    if file.local is not None:
        with replace_file(file.local) as temporary:
            yield temporary
        return
    # Closing a stream to a store would keep half a file; a copy can also be tried again.
    with tempfile.TemporaryDirectory(prefix="offtower-") as folder:
        path = Path(folder) / file.name
        yield path
        file.send(path)
