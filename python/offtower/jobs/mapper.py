"""Parts of a long pass as Ray tasks: retried where a worker dies, in order, in bounded memory."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from offtower.errors import ClusterError, OfftowerError
from offtower.imports import TRUST_CODE
from offtower.jobs.connect import connect, import_ray, require
from offtower.jobs.tensors import share_large_tensors
from offtower.mapping import Mapper
from offtower.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
_AHEAD = 4
"""Results that wait for an earlier one, as a multiple of the workers."""
_QUIET_SECONDS = 120.0
"""After so long without a result the log says what the tasks wait for."""

logger = logging.getLogger("offtower.jobs")


@dataclass(frozen=True)
class _Failed:
    """An error for users, as a result: raised where the parts' order says so, and not retried."""

    error: OfftowerError | OSError


class RayMapper(Mapper):
    """Runs the parts as tasks on the cluster that this process is connected to.

    Args:
        workers: tasks at the same time.
        cpus: of a task; they are the threads that it computes with.
        memory: bytes that a task is promised by its node, 0 for no promise. Ray places tasks by
            such promises, and so by memory too.
        retries: how often a part is tried again after its worker or node was lost.
    """

    distributed = True

    def __init__(
        self, workers: int, cpus: float = 1.0, memory: float = 0.0, retries: int = RETRIES
    ) -> None:
        self.workers = workers
        self.cpus, self.memory, self.retries = cpus, memory, retries

    def map(self, function: Callable[[T], R], parts: Sequence[T], task: str = "") -> Iterator[R]:
        """As `Mapper.map`; parts of a dead worker run again elsewhere.

        Raises:
            ClusterError: a part's worker was lost again and again, or the cluster is gone.
        """
        ray = import_ray()
        options: dict[str, Any] = {
            "num_cpus": self.cpus,
            "max_retries": self.retries,
            "retry_exceptions": False,
            "scheduling_strategy": "SPREAD",
            "name": f"offtower: {task}",
        }
        if self.memory:
            options["memory"] = int(self.memory)
        remote = ray.remote(_run).options(**options)
        settings = (os.getcwd(), max(1, int(self.cpus)), os.environ.get(TRUST_CODE, ""))
        shared = ray.put(function)  # Once for all parts, and one copy on a node.
        running: dict[Any, int] = {}
        done: dict[int, Any] = {}
        started = following = 0
        end = len(parts)
        heard = time.monotonic()
        try:
            while following < end:
                while (
                    started < end
                    and len(running) < self.workers
                    and started - following < _AHEAD * self.workers
                ):
                    ref = remote.remote(shared, parts[started], *settings)
                    running[ref] = started
                    started += 1
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_QUIET_SECONDS)
                if not ready:
                    _say_what_is_missing(ray, task, len(running), time.monotonic() - heard)
                    continue
                heard = time.monotonic()
                for ref in ready:
                    number = running.pop(ref)
                    try:
                        done[number] = ray.get(ref)
                    except ray.exceptions.RayTaskError:
                        raise  # An error of the code: its traceback says where.
                    except ray.exceptions.RayError as error:
                        raise self._lost(task, parts[number], error) from error
                    if isinstance(done[number], _Failed):
                        end = min(end, number + 1)  # Parts after it no longer matter.
                while following in done:
                    result = done.pop(following)
                    following += 1
                    if isinstance(result, _Failed):
                        raise result.error
                    yield result
        finally:
            for ref in running:
                with contextlib.suppress(Exception):
                    ray.cancel(ref)

    def _lost(self, task: str, part: Any, error: Exception) -> ClusterError:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return ClusterError(
            f"{task or 'a job'}: the worker of part {_shown(part)} was lost {self.retries + 1} "
            f"times ({type(error).__name__}: {said}). Most often the node's memory did not do: "
            "use fewer --workers, larger nodes, or promise each task more (--worker-memory GIB). "
            "'ray logs' and the dashboard show what the worker said last"
        )


@contextmanager
def ray_mapper(
    address: str,
    workers: int | None = None,
    *,
    cpus: float = 1.0,
    memory: float = 0.0,
    wait: float = 0.0,
    progress: Progress | None = None,
) -> Iterator[RayMapper]:
    """A mapper on a cluster that is started or joined, after a check that the workers have room.

    Args:
        address: see `connect`.
        workers: tasks at the same time; without it as many as the cluster has room for.
        cpus, memory: of each. wait: see `require`.

    Raises:
        ClusterError: no cluster, or no room.
        MissingExtraError: Ray is not installed.
    """
    wanted = None if workers is None else max(1, int(-(-workers * cpus // 1)))
    with connect(address, num_cpus=wanted):
        room = require(workers or 1, cpus, memory_per_worker=memory, wait=wait, progress=progress)
        if workers is None:
            each = [min(node.workers(cpus, 0.0, memory), 1024) for node in room.nodes]
            workers = max(1, sum(each))
        share_large_tensors()
        yield RayMapper(workers, cpus, memory)


def settle(folder: str, threads: int, trust_code: str) -> None:
    """Give this worker its threads, and the driver's working folder and trusted code."""
    import torch

    os.environ[TRUST_CODE] = trust_code
    torch.set_num_threads(threads)  # Ray gives each worker one thread, whatever its CPUs.
    # Relative paths mean what they mean to the driver. A job's own folder of files has another
    # place on each node, and there the worker stands in its copy already.
    with contextlib.suppress(OSError):
        os.chdir(folder)


def _run(
    function: Callable[[Any], Any], part: Any, folder: str, threads: int, trust_code: str
) -> Any:
    settle(folder, threads, trust_code)
    try:
        return function(part)
    except (OfftowerError, OSError) as error:
        return _Failed(error)


def _say_what_is_missing(ray: Any, task: str, waiting: int, seconds: float) -> None:
    free, there = ray.available_resources(), ray.cluster_resources()
    logger.warning(
        "%s: no result for %.0f s; %d tasks run or wait, %g of the cluster's %g CPUs are free",
        task or "a job",
        seconds,
        waiting,
        free.get("CPU", 0.0),
        there.get("CPU", 0.0),
    )


def _shown(part: Any) -> str:
    text = repr(part)
    return text if len(text) <= 60 else text[:57] + "..."
