"""What a command says of errors and deaths of its workers."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from offtower.data.stores import is_address
from offtower.errors import ClusterError

_QUOTED = re.compile(r"'([^'\n]*/[^'\n]*)'")
_LOW_ON_MEMORY = "running low on memory"
"""Of Ray's message where its memory monitor killed a worker; the lines after it are advice."""
_MAX_CAUSE = 200
_SEEN_SECONDS = 10.0
"""NFS clients may see a new folder a few seconds late."""


def cause_of(error: BaseException) -> str:
    """Return why a worker ended, in at most 200 characters: the last line of the error's message,
    or the one that says that memory ran out."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    low = [line for line in lines if _LOW_ON_MEMORY in line]
    return f"out of memory: {low[0]}"[:_MAX_CAUSE] if low else lines[-1][:_MAX_CAUSE]


def absent_paths(error: BaseException) -> tuple[str, ...]:
    """Return the paths that an error names and this node does not have."""
    names = _QUOTED.findall(str(error))
    if isinstance(error, OSError) and isinstance(error.filename, str):
        names.append(error.filename)
    local = [name for name in dict.fromkeys(names) if not is_address(name)]
    return tuple(name for name in local if not os.path.exists(name))


def unseen(node: str, absent: Iterable[str], message: str) -> ClusterError | None:
    """Return the error of a node that lacks what this process sees; None where it lacks nothing.

    Args:
        absent: `absent_paths` of the node's error.
        message: of the node's error.
    """
    for path in absent:
        if os.path.exists(path):
            return ClusterError(
                f"node {node} does not see '{path}', which this machine has. Mount the same "
                "storage under the same path on every node, or use an address of an object store. "
                f"({message})"
            )
    return None


def check_seen(folder: Path, waits: Sequence[float] = (_SEEN_SECONDS / 10,) * 10) -> None:
    """Check that this node sees a folder that the command has made.

    Raises:
        ClusterError: names the node and the folder.
    """
    for seconds in (*waits, 0.0):
        if folder.is_dir():
            return
        time.sleep(seconds)
    raise ClusterError(
        f"node {socket.gethostname()} does not see '{folder}'. Mount the storage of the runs under "
        "the same path on every node"
    )
