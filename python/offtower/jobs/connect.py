"""Start or join a Ray cluster, and stop what was started."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from offtower.data.stores import is_address
from offtower.errors import ClusterError
from offtower.jobs.resources import import_ray

MIN_OBJECT_STORE = 80 * 1024**2
"""Bytes; Ray refuses a smaller store."""
_REACH_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """The cluster that this process is connected to.

    Attributes:
        started: whether `connect` started it, and stops it.
    """

    address: str
    started: bool


def absolute(path: str | Path) -> str:
    """Return an absolute path without links, since workers run in other folders; addresses such as
    s3://bucket/log are unchanged."""
    text = str(path)
    return text if is_address(text) else str(Path(text).expanduser().resolve())


def check_address(address: str) -> str:
    """Return the address if `connect` can use its form.

    Raises:
        ClusterError: it cannot.
    """
    if address in ("local", "auto") or all(_host_and_port(address)):
        return address
    raise ClusterError(
        f"--ray '{address}' is no address of a cluster: use local (start one on this machine), "
        "auto (the one that this machine belongs to), HOST:PORT of the head's GCS (6379 by "
        "default), or ray://HOST:PORT of a Ray client server (10001 by default)"
    )


@contextmanager
def connect(
    address: str = "local",
    *,
    num_cpus: int | None = None,
    object_store_memory: int | None = None,
    temp_dir: str | Path | None = None,
) -> Iterator[Cluster]:
    """Start a cluster on this machine or join one; at the end stop it if it was started here.

    A process that is connected already (a job's driver, a test session) keeps its cluster whatever
    the address is, and stays connected. Token authentication follows Ray's own settings
    (RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH).

    Args:
        address: "local" starts a cluster; "auto" joins that of RAY_ADDRESS or of this machine;
            "host:port" joins from a machine of the cluster, "ray://host:port" from outside.
        num_cpus: of a cluster started here; by default the cores that this process may use.
        object_store_memory: bytes, of a cluster started here; by default 30 % of the memory.
        temp_dir: sockets and logs of a cluster started here, /tmp/ray by default. Keep it short:
            the path of a socket has at most 107 bytes.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: the cluster cannot be reached, refuses the token, or does not start.
    """
    check_address(address)
    ray = import_ray()
    if ray.is_initialized():
        yield Cluster(_gcs_address(ray), started=False)
        return
    started = address == "local"
    options: dict[str, Any] = {
        "address": address,
        "logging_level": logging.WARNING,
        "log_to_driver": False,
    }
    if started:
        options["num_cpus"] = _usable_cpus() if num_cpus is None else num_cpus
        options["include_dashboard"] = False
        if object_store_memory is not None:
            options["object_store_memory"] = max(MIN_OBJECT_STORE, object_store_memory)
        if temp_dir is not None:
            options["_temp_dir"] = absolute(temp_dir)
    else:
        _check_reachable(address)
    # Ray logs the use of a token, its default, at every start.
    token_logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    level = token_logger.level
    token_logger.setLevel(logging.ERROR)
    try:
        with _without_working_folder():
            ray.init(**options)
    except Exception as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise _connect_error(address, error) from error
    finally:
        token_logger.setLevel(level)
    try:
        yield Cluster(_gcs_address(ray), started)
    finally:
        ray.shutdown()


def _without_working_folder() -> AbstractContextManager[object]:
    """Keep Ray from letting workers import from a working folder that this process does not use.

    Ray puts the folder where `ray.init` is called first on the workers' sys.path.
    """
    here = Path.cwd()
    own = any(Path(entry).resolve() == here for entry in sys.path)
    relative = any(
        entry and not os.path.isabs(entry)
        for entry in os.environ.get("PYTHONPATH", "/").split(os.pathsep)
    )
    return contextlib.nullcontext() if own or relative else contextlib.chdir("/")


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gcs_address(ray: Any) -> str:
    try:
        return str(ray.get_runtime_context().gcs_address)
    except Exception:
        return "through a Ray client"


def _host_and_port(address: str) -> tuple[str, int]:
    """Parse HOST:PORT or ray://HOST:PORT; ("", 0) for anything else."""
    try:
        parts = urlsplit(address if "://" in address else f"gcs://{address}")
        port = parts.port
    except ValueError:
        return "", 0
    if parts.scheme not in ("gcs", "ray") or parts.path not in ("", "/"):
        return "", 0
    if parts.scheme == "ray" and port is None:
        port = 10001
    return parts.hostname or "", port or 0


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing listens within seconds; Ray itself retries for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    host, port = _host_and_port(address)
    if not host or not port:
        return
    try:
        socket.create_connection((host, port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at '{address}' ({error}). Is its head up, and is the port "
            "open to this machine? The head's GCS listens on 6379 by default, its Ray client "
            "server (ray://) on 10001"
        ) from error


def _connect_error(address: str, error: Exception) -> ClusterError:
    lines = str(error).strip().splitlines()
    cause = f"{type(error).__name__}: {lines[0] if lines else ''}"
    if address == "local":
        return ClusterError(
            f"no Ray cluster could be started on this machine ({cause}). Its logs are in "
            "/tmp/ray/session_latest/logs; a full /tmp or /dev/shm, and a home folder that the "
            "token (~/.ray/auth_token) cannot be written to, are the usual reasons"
        )
    if "authentic" in str(error).lower() or "token" in str(error).lower():
        return ClusterError(
            f"the Ray cluster at '{address}' refuses this process's token ({cause}). Set the "
            "cluster's: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
        )
    if address == "auto":
        return ClusterError(
            f"no running Ray cluster was found on this machine ({cause}). Start one with 'ray "
            "start --head', name one (--ray HOST:PORT, or RAY_ADDRESS), or use --ray local"
        )
    return ClusterError(
        f"'{address}' cannot be joined ({cause}). HOST:PORT works from a machine that belongs to "
        "the cluster; from outside submit the command with 'ray job submit', or use ray://"
    )
