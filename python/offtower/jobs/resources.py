"""Resources that a job requests, compared with those of the cluster.

Ray waits forever for resources that the cluster never gets; `require` refuses such a job.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from offtower.errors import ClusterError, MissingExtraError
from offtower.progress import Progress

_POLL_SECONDS = 1.0
_MAX_LISTED_NODES = 16


def import_ray() -> Any:
    """Import Ray, by default without usage reports and with 3 retries of a task that ran out of
    memory (Ray's default is to retry forever).

    Raises:
        MissingExtraError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", "3")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "running on Ray") from error


@dataclass(frozen=True)
class Node:
    """A live node and all its resources, in use or not; memory in bytes."""

    name: str
    cpus: float
    gpus: float
    memory: float

    def workers(self, cpus: float, gpus: float, memory: float = 0.0) -> int:
        """Number of workers with these resources that fit on the node."""
        requested = ((self.cpus, cpus), (self.gpus, gpus), (self.memory, memory))
        fits = [(has + 1e-9) // each for has, each in requested if each > 0]
        return int(min(fits, default=2**31 - 1))


def nodes() -> tuple[Node, ...]:
    """Live nodes of the connected cluster, sorted by name."""
    found = []
    for node in import_ray().nodes():
        if node["Alive"]:
            name = node.get("NodeName") or node["NodeManagerAddress"]
            cpus, gpus, memory = (
                float(node["Resources"].get(key, 0.0)) for key in ("CPU", "GPU", "memory")
            )
            found.append(Node(name, cpus, gpus, memory))
    return tuple(sorted(found, key=lambda node: node.name))


@dataclass(frozen=True)
class ResourceRequest:
    """Workers that must run at the same time; cpus, gpus and memory (bytes) are of each.

    Raises:
        ClusterError: a number is negative, or there is no worker.
    """

    num_workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    memory: float = 0.0

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ClusterError(f"a job needs at least one worker, got {self.num_workers}")
        for name in ("cpus", "gpus", "memory"):
            if not getattr(self, name) >= 0:
                raise ClusterError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def resources(self) -> dict[str, float]:
        """Resources of each worker, by Ray's names."""
        each = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return {name: amount for name, amount in each.items() if amount}

    def capacity(self, node: Node) -> int:
        """Number of the workers that fit on an otherwise idle node."""
        return min(node.workers(self.cpus, self.gpus, self.memory), self.num_workers)

    def total_capacity(self, found: Sequence[Node]) -> int:
        """Number of the workers that fit on otherwise idle nodes."""
        return min(sum(self.capacity(node) for node in found), self.num_workers)

    def fits(self, found: Sequence[Node]) -> bool:
        """Whether all workers fit."""
        return self.total_capacity(found) == self.num_workers

    def refusal(self, found: Sequence[Node], waited: float = 0.0) -> str:
        """Message that compares the request with the nodes."""
        each = _amount(self.cpus, "CPU")
        each += f" and {_amount(self.gpus, 'GPU')}" if self.gpus else ""
        each += f" and {self.memory / 2**30:.3g} GiB" if self.memory else ""
        requested = _resources(self.num_workers * self.cpus, self.num_workers * self.gpus)
        available = _resources(sum(n.cpus for n in found), sum(n.gpus for n in found))
        lines = [
            f"the cluster has no room for {_amount(self.num_workers, 'worker')} of {each}"
            + (f" and has not grown in {waited:g} s:" if waited else ":"),
            f"  asked  {requested}",
            f"  there  {available} on {_amount(len(found), 'node')}, "
            f"room for {self.total_capacity(found)} of the workers",
        ]
        lines += [
            f"    {node.name}: {_resources(node.cpus, node.gpus)}, "
            f"{node.memory / 2**30:.1f} GiB, room for {self.capacity(node)}"
            for node in found[:_MAX_LISTED_NODES]
        ]
        if len(found) > _MAX_LISTED_NODES:
            lines.append(f"    and {len(found) - _MAX_LISTED_NODES} more nodes")
        lines.append(
            "Ask for fewer or smaller workers, or add nodes; where an autoscaler adds them, let "
            "the job wait for it (--ray-wait SECONDS)"
        )
        return "\n".join(lines)


def require(
    request: ResourceRequest, *, wait: float = 0.0, progress: Progress | None = None
) -> tuple[Node, ...]:
    """Refuse a request that the cluster cannot satisfy, and return the cluster's nodes.

    The request is compared with all resources of the nodes, free or not: a job that fits waits
    until others have ended.

    Args:
        wait: seconds that the cluster may take to grow; an autoscaler is asked for the workers.
        progress: shows for how many of the workers there is room while waiting.

    Raises:
        ClusterError: the cluster has no room for the workers, or has not grown in time.
    """
    found = nodes()
    if request.fits(found):
        return found
    if wait <= 0.0:
        raise ClusterError(request.refusal(found, wait))
    progress = progress or Progress()
    deadline, shown = time.monotonic() + wait, 0
    progress.start(f"waiting up to {wait:g} s for the cluster to grow", request.num_workers)
    try:
        with _requested_from_autoscaler(request):
            while not request.fits(found := nodes()):
                if time.monotonic() >= deadline:
                    raise ClusterError(request.refusal(found, wait))
                room = request.total_capacity(found)
                progress.advance(room - shown, f"{len(found)} nodes, room for {room} workers")
                shown = room
                time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
    finally:
        progress.finish()
    return found


@contextmanager
def _requested_from_autoscaler(request: ResourceRequest) -> Iterator[None]:
    """Hold a placement group of the workers until the block ends.

    It is this job's own demand: `ray.autoscaler.sdk.request_resources` has one request for the
    whole cluster, so that each job would overwrite those of the others.
    """
    import_ray()
    from ray.util import placement_group, remove_placement_group

    group = placement_group([request.resources] * request.num_workers, strategy="PACK")
    try:
        yield
    finally:
        # Held longer, it would keep the resources from the job's workers.
        remove_placement_group(group)


def _resources(cpus: float, gpus: float) -> str:
    return f"{_amount(cpus, 'CPU')}, {_amount(gpus, 'GPU')}"


def _amount(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
