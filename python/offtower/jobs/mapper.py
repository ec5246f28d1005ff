"""Run the parts of a long pass as Ray tasks: results in order, lost workers retried."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from offtower.errors import ClusterError, OfftowerError
from offtower.jobs.connect import connect
from offtower.jobs.resources import ResourceRequest, import_ray, require
from offtower.jobs.tensors import share_large_tensors
from offtower.jobs.worker_errors import absent_paths, cause_of, unseen
from offtower.jobs.worker_settings import WorkerSettings
from offtower.mapping import Mapper
from offtower.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
_MAX_AHEAD = 4
"""Results that wait for an earlier one, as a multiple of the number of workers."""
_QUIET_SECONDS = 120.0
"""Without a result for this long, the free resources are logged."""

logger = logging.getLogger("offtower.jobs")


@dataclass(frozen=True)
class _Failed:
    """An error for users, returned as a result: it is raised in the order of the parts and not
    retried.

    Attributes:
        node: of the worker.
        absent: paths that the error names and the node does not have.
    """

    error: OfftowerError | OSError
    node: str
    absent: tuple[str, ...]

    @property
    def raised(self) -> OfftowerError | OSError:
        """The error, or that of a node which lacks storage that this process sees."""
        return unseen(self.node, self.absent, str(self.error)) or self.error


class RayMapper(Mapper):
    """Runs parts as tasks on the connected cluster.

    Args:
        workers: tasks at the same time.
        cpus: of a task, and its number of threads.
        memory: bytes that Ray reserves for a task when it places it; 0 reserves none.
        retries: how often a part is run again after its worker or node was lost.
        gpus: of a task.
    """

    distributed = True

    def __init__(
        self,
        workers: int,
        cpus: float = 1.0,
        memory: float = 0.0,
        retries: int = RETRIES,
        gpus: float = 0.0,
    ) -> None:
        self.workers, self.gpus = workers, gpus
        self.cpus, self.memory, self.retries = cpus, memory, retries

    def map(
        self,
        function: Callable[[T], R],
        parts: Sequence[T],
        task: str = "",
        *,
        on_lost: Callable[[T, Exception], R] | None = None,
    ) -> Iterator[R]:
        """Return the results in order, as `Mapper.map`.

        Raises:
            ClusterError: a part's worker was lost too often, or the cluster is gone.
        """
        ray = import_ray()
        options: dict[str, Any] = {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "max_retries": self.retries,
            "retry_exceptions": False,
            "scheduling_strategy": "SPREAD",
            "name": f"offtower: {task}",
        }
        if self.memory:
            options["memory"] = int(self.memory)
        remote = ray.remote(_run).options(**options)
        settings = WorkerSettings.of(self.cpus)
        shared = ray.put(function)  # Once for all parts; one copy per node.
        running: dict[Any, int] = {}
        done: dict[int, Any] = {}
        started = following = 0
        end = len(parts)
        last_result = time.monotonic()
        try:
            while following < end:
                limit = min(end, following + _MAX_AHEAD * self.workers)
                while started < limit and len(running) < self.workers:
                    running[remote.remote(shared, parts[started], settings)] = started
                    started += 1
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_QUIET_SECONDS)
                if not ready:
                    _log_resources(ray, task, len(running), time.monotonic() - last_result)
                    continue
                last_result = time.monotonic()
                for ref in ready:
                    number = running.pop(ref)
                    try:
                        done[number] = ray.get(ref)
                    except ray.exceptions.RayTaskError:
                        raise  # A bug, with the traceback of the worker.
                    except ray.exceptions.RayError as error:
                        lost = self._lost_error(task, parts[number], error)
                        died = (
                            ray.exceptions.WorkerCrashedError,
                            ray.exceptions.OutOfMemoryError,
                        )
                        if on_lost is None or not isinstance(error, died):
                            raise lost from error
                        done[number] = on_lost(parts[number], lost)
                    if isinstance(done[number], _Failed):
                        end = min(end, number + 1)  # Later parts no longer matter.
                while following in done:
                    result = done.pop(following)
                    following += 1
                    if isinstance(result, _Failed):
                        raise result.raised
                    yield result
        finally:
            for ref in running:
                with contextlib.suppress(Exception):
                    ray.cancel(ref)

    def _lost_error(self, task: str, part: Any, error: Exception) -> ClusterError:
        text = repr(part)
        text = text if len(text) <= 60 else text[:57] + "..."
        # Ray retries what a node ended for lack of memory apart from `retries`, by its own count.
        by_memory = isinstance(error, import_ray().exceptions.OutOfMemoryError)
        often = "repeatedly" if by_memory else f"{self.retries + 1} times"
        return ClusterError(
            f"{task or 'a job'}: the worker of part {text} was lost {often} "
            f"({type(error).__name__}: {cause_of(error)}). Usually a node ran out of memory: use "
            "fewer --workers, larger nodes, or reserve more for each task (--worker-memory GIB). "
            "'ray logs' and the dashboard show the worker's last output"
        )


@contextmanager
def ray_mapper(
    address: str,
    workers: int | None = None,
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
    memory: float = 0.0,
    wait: float = 0.0,
    progress: Progress | None = None,
) -> Iterator[RayMapper]:
    """Yield a mapper on a cluster that is started or joined and has room for the workers.

    Args:
        address: as in `connect`.
        workers: tasks at the same time; None is as many as the cluster has room for.
        cpus, gpus, memory: of each task, as in `RayMapper`.
        wait: as in `require`.

    Raises:
        ClusterError: no cluster, or no room.
        MissingExtraError: Ray is not installed.
    """
    num_cpus = None if workers is None else max(1, math.ceil(workers * cpus))
    with connect(address, num_cpus=num_cpus):
        request = ResourceRequest(workers or 1, cpus, gpus, memory)
        nodes = require(request, wait=wait, progress=progress)
        if workers is None:
            workers = max(1, sum(min(node.workers(cpus, gpus, memory), 1024) for node in nodes))
        share_large_tensors()
        yield RayMapper(workers, cpus, memory, gpus=gpus)


def _run(function: Callable[[Any], Any], part: Any, settings: WorkerSettings) -> Any:
    try:
        settings.apply()
        return function(part)
    except (OfftowerError, OSError) as error:
        return _Failed(error, socket.gethostname(), absent_paths(error))


def _log_resources(ray: Any, task: str, waiting: int, seconds: float) -> None:
    free, total = ray.available_resources(), ray.cluster_resources()
    logger.warning(
        "%s: no result for %.0f s; %d tasks run or wait, %g of the cluster's %g CPUs are free",
        task or "a job",
        seconds,
        waiting,
        free.get("CPU", 0.0),
        total.get("CPU", 0.0),
    )
