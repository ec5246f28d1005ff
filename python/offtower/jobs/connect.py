"""Connecting to Ray: a cluster is started or joined, and what was started is stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from offtower.data.stores import is_address
from offtower.errors import ClusterError
from offtower.jobs.resources import Node, Placement, Request, Room, import_ray, nodes, require

__all__ = [
    "Cluster",
    "Node",
    "Placement",
    "Request",
    "Room",
    "absolute",
    "check_address",
    "connect",
    "import_ray",
    "nodes",
    "require",
]

LEAST_OBJECT_STORE = 80 * 1024**2
"""Ray refuses a smaller one."""
_REACH_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to.

    started: whether `connect` started it, and will stop it.
    """

    address: str
    started: bool


def absolute(path: str | Path) -> str:
    """A path as workers must get it: absolute (their working folder is another), links followed.
    An address such as s3://bucket/log stays as it is."""
    text = str(path)
    return text if is_address(text) else str(Path(text).expanduser().resolve())


def check_address(address: str) -> str:
    """The address, if it has one of the known forms.

    Raises:
        ClusterError: it has none.
    """
    if address in ("local", "auto"):
        return address
    host, port = _host_and_port(address)
    if host and port:
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
    num_gpus: int | None = None,
    object_store_memory: int | None = None,
    dashboard: bool = False,
    worker_logs: bool = False,
    temp_dir: str | Path | None = None,
    runtime_env: Mapping[str, Any] | None = None,
) -> Iterator[Cluster]:
    """Start a cluster on this machine or join one; at the end stop what was started, and only that.

    A process that is connected already (a job's driver that called `ray.init`, a test session)
    stays with its cluster whatever the address says, and stays connected afterwards.

    Token authentication follows Ray's own settings (RAY_AUTH_MODE, RAY_AUTH_TOKEN,
    RAY_AUTH_TOKEN_PATH): by default a cluster started here makes and uses ~/.ray/auth_token.

    Args:
        address: "local" starts a cluster; "auto" joins the one that RAY_ADDRESS names or this
            machine belongs to; "host:port" joins one from a machine that belongs to it;
            "ray://host:port" is a Ray client from outside.
        num_cpus: logical CPUs of a cluster started here: how many tasks run at once. By default
            the cores that this process may use.
        num_gpus: GPUs of a cluster started here; those that Ray detects by default.
        object_store_memory: bytes of its object store, shared memory that is taken as it fills. By
            default Ray's own choice, 30 % of the memory; what jobs put there is in docs/cluster.md.
        dashboard: start its dashboard, which takes nine processes and about 1 GB.
        worker_logs: print what workers print on this process's standard output.
        temp_dir: where a cluster started here keeps sockets and logs (/tmp/ray by default). Short:
            a socket's path has at most 107 bytes.
        runtime_env: Ray's runtime environment of the workers.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: the cluster cannot be reached, refuses the token, or does not start.
    """
    check_address(address)
    ray = import_ray()
    if ray.is_initialized():
        yield Cluster(_gcs_address(ray), started=False)
        return
    options: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "log_to_driver": worker_logs,
        "runtime_env": None if runtime_env is None else dict(runtime_env),
    }
    started = address == "local"
    if started:
        options |= {
            "address": "local",
            "num_cpus": _usable_cpus() if num_cpus is None else num_cpus,
            "include_dashboard": dashboard,
        }
        if object_store_memory is not None:
            options["object_store_memory"] = max(LEAST_OBJECT_STORE, object_store_memory)
        if num_gpus is not None:
            options["num_gpus"] = num_gpus
        if temp_dir is not None:
            options["_temp_dir"] = absolute(temp_dir)
    else:
        options["address"] = address
        _reach(address)
    # Ray says at each start that a token is used; that is its default, and no news.
    quiet = logging.getLogger("ray._private.authentication.authentication_token_setup")
    before = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with _without_working_folder(runtime_env):
            ray.init(**options)
    except Exception as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise _connect_error(address, error) from error
    finally:
        quiet.setLevel(before)
    try:
        yield Cluster(_gcs_address(ray), started)
    finally:
        ray.shutdown()


def _without_working_folder(
    runtime_env: Mapping[str, Any] | None,
) -> AbstractContextManager[None]:
    """Keep Ray from letting workers import from a working folder that this process does not use.

    Ray puts the folder where `ray.init` is called first on the workers' sys.path.
    """
    here = Path.cwd()
    own = any(Path(entry).resolve() == here for entry in sys.path)
    relative = any(
        not os.path.isabs(entry) for entry in os.environ.get("PYTHONPATH", "/").split(os.pathsep)
    )
    if own or relative or runtime_env is not None:
        return contextlib.nullcontext()
    return contextlib.chdir("/")


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
    """("", 0) where the address is neither HOST:PORT nor ray://HOST:PORT."""
    plain = address if "://" in address else f"gcs://{address}"
    try:
        parts = urlsplit(plain)
        port = parts.port
    except ValueError:
        return "", 0
    if parts.scheme not in ("gcs", "ray") or parts.path not in ("", "/"):
        return "", 0
    if parts.scheme == "ray" and port is None:
        port = 10001
    return parts.hostname or "", port or 0


def _reach(address: str) -> None:
    """Refuse an address where nothing listens, in seconds; Ray itself tries for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    host, port = _host_and_port(address) if address else ("", 0)
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
    text = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {text[0] if text else ''}"
    if address == "local":
        return ClusterError(
            f"no Ray cluster could be started on this machine ({said}). Its logs are in "
            "/tmp/ray/session_latest/logs; a full /tmp or /dev/shm, and a home folder that the "
            "token (~/.ray/auth_token) cannot be written to, are the usual reasons"
        )
    if "authentic" in str(error).lower() or "token" in str(error).lower():
        return ClusterError(
            f"the Ray cluster at '{address}' refuses this process's token ({said}). Give it the "
            "cluster's: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
        )
    if address == "auto":
        return ClusterError(
            f"no running Ray cluster was found on this machine ({said}). Start one with 'ray "
            "start --head', name one (--ray HOST:PORT, or RAY_ADDRESS), or use --ray local"
        )
    return ClusterError(
        f"'{address}' cannot be joined ({said}). HOST:PORT works from a machine that belongs to "
        "the cluster; from outside submit the command with 'ray job submit', or use ray://"
    )
