"""What a job asks of a cluster, compared with what the cluster has.

Ray waits for ever for resources that will never come; `require` refuses them, with the numbers.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from offtower.errors import ClusterError, MissingExtraError
from offtower.progress import Progress

Placement = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
"""Ray's placement strategies: STRICT_PACK wants all workers on one node, STRICT_SPREAD each on a
node of its own; the other two only prefer it."""

_POLL_SECONDS = 1.0
_SHOWN_NODES = 16


def import_ray() -> Any:
    """The module `ray`. Unless the environment says otherwise usage reports are off, and a task
    that its node ended for want of memory is tried three times more, where Ray would try for ever.

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
    """A living node of the cluster and all that it has, used or not."""

    name: str
    cpus: float
    gpus: float
    memory: float
    """Bytes that Ray hands out."""

    def workers(self, cpus: float, gpus: float, memory: float = 0.0) -> int:
        """How many workers of so many CPUs, GPUs and bytes this node holds."""
        fits = [math.inf]
        for has, each in ((self.cpus, cpus), (self.gpus, gpus), (self.memory, memory)):
            if each > 0:
                fits.append((has + 1e-9) // each)
        least = min(fits)
        return 2**31 - 1 if math.isinf(least) else int(least)


@dataclass(frozen=True)
class Room:
    """What `require` found: the nodes, and how many CPUs and GPUs nobody uses at this moment."""

    nodes: tuple[Node, ...]
    free_cpus: float
    free_gpus: float


def nodes() -> tuple[Node, ...]:
    """The living nodes of the cluster that this process is connected to, by name."""
    found = []
    for one in import_ray().nodes():
        if not one["Alive"]:
            continue
        has = one["Resources"]
        found.append(
            Node(
                one.get("NodeName") or one["NodeManagerAddress"],
                float(has.get("CPU", 0.0)),
                float(has.get("GPU", 0.0)),
                float(has.get("memory", 0.0)),
            )
        )
    return tuple(sorted(found, key=lambda node: node.name))


def require(
    num_workers: int,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    other_cpus: float = 0.0,
    placement: Placement = "PACK",
    *,
    memory_per_worker: float = 0.0,
    wait: float = 0.0,
    progress: Progress | None = None,
) -> Room:
    """Refuse a job that the cluster can never run, with the numbers, in place of waiting for ever.

    What counts is what the nodes have, not what is free: a job that fits waits its turn.

    Args:
        num_workers: workers that must run at the same time.
        cpus_per_worker, gpus_per_worker: of each; all of one node.
        other_cpus: CPUs that the job needs beside its workers, on any node: a coordinating task,
            readers of data. Without them Ray Train and Ray Data wait for each other for ever.
        placement: whether workers must share a node, or may not.
        memory_per_worker: bytes that its node promises each; 0 for no promise.
        wait: seconds that the cluster may take to grow, by an autoscaler (which is asked for the
            workers) or by nodes that are still starting. 0: what is there must do.
        progress: told how many of the workers have room, while waiting.

    Returns:
        The nodes, and what is free of them.

    Raises:
        ClusterError: the cluster has no room for the workers, or has not grown in time.
    """
    wanted = Request(
        num_workers, cpus_per_worker, gpus_per_worker, other_cpus, placement, memory_per_worker
    )
    ray = import_ray()
    progress = progress or Progress()
    deadline = time.monotonic() + wait
    asked, shown = False, 0
    try:
        while True:
            seen = nodes()
            if wanted.fits(seen):
                break
            if time.monotonic() >= deadline:
                raise ClusterError(wanted.refusal(seen, wait))
            if not asked:
                asked = True
                progress.start(f"waiting up to {wait:g} s for the cluster to grow", num_workers)
                _ask_autoscaler(ray, wanted)
            room = wanted.room(seen)
            progress.advance(room - shown, f"{len(seen)} nodes, room for {room} workers")
            shown = room
            time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
    finally:
        if asked:
            progress.finish()
            # A standing request would keep nodes alive after the job; its tasks hold them now.
            _ask_autoscaler(ray, None)
    free = ray.available_resources()
    return Room(seen, float(free.get("CPU", 0.0)), float(free.get("GPU", 0.0)))


@dataclass(frozen=True)
class Request:
    """What a job asks of a cluster; see `require`.

    Raises:
        ClusterError: a number is negative, or there is no worker.
    """

    num_workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    other_cpus: float = 0.0
    placement: Placement = "PACK"
    memory: float = 0.0

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ClusterError(f"a job needs at least one worker, got {self.num_workers}")
        for name in ("cpus", "gpus", "other_cpus", "memory"):
            if not getattr(self, name) >= 0:
                raise ClusterError(f"{name} must not be negative, got {getattr(self, name)}")

    def room(self, found: Sequence[Node]) -> int:
        """How many of the workers have room on these nodes, were nothing else running."""
        each = [node.workers(self.cpus, self.gpus, self.memory) for node in found]
        if self.placement == "STRICT_PACK":
            room = max(each, default=0)
        elif self.placement == "STRICT_SPREAD":
            room = sum(1 for one in each if one > 0)
        else:
            room = sum(each)
        return min(room, self.num_workers)

    def fits(self, found: Sequence[Node]) -> bool:
        """Whether all workers and the other CPUs have room."""
        if self.room(found) < self.num_workers:
            return False
        return sum(node.cpus for node in found) + 1e-9 >= self.total_cpus

    @property
    def total_cpus(self) -> float:
        return self.num_workers * self.cpus + self.other_cpus

    def refusal(self, found: Sequence[Node], waited: float = 0.0) -> str:
        """Why it does not fit: asked, there, and by node."""
        gpus = self.num_workers * self.gpus
        each = _amount(self.cpus, "CPU") + (f" and {_amount(self.gpus, 'GPU')}" if gpus else "")
        each += f" and {self.memory / 2**30:.3g} GiB" if self.memory else ""
        workers = f"{self.num_workers} worker{'' if self.num_workers == 1 else 's'} of {each}"
        beside = f" and {_amount(self.other_cpus, 'CPU')} beside them" if self.other_cpus else ""
        where = {"STRICT_PACK": ", all on one node", "STRICT_SPREAD": ", each on its own node"}
        grown = f" and has not grown in {waited:g} s" if waited else ""
        lines = [
            f"the cluster has no room for {workers}{where.get(self.placement, '')}{beside}{grown}:",
            f"  asked  {_resources(self.total_cpus, gpus)}",
            f"  there  {_resources(sum(n.cpus for n in found), sum(n.gpus for n in found))} "
            f"on {len(found)} node{'' if len(found) == 1 else 's'}, "
            f"room for {self.room(found)} of the workers",
        ]
        for node in found[:_SHOWN_NODES]:
            room = min(node.workers(self.cpus, self.gpus, self.memory), self.num_workers)
            lines.append(
                f"    {node.name}: {_resources(node.cpus, node.gpus)}, "
                f"{node.memory / 2**30:.1f} GiB, room for {room}"
            )
        if len(found) > _SHOWN_NODES:
            lines.append(f"    and {len(found) - _SHOWN_NODES} more nodes")
        lines.append(
            "Ask for fewer or smaller workers, or add nodes; where an autoscaler adds them, let "
            "the job wait for it (--ray-wait SECONDS)"
        )
        return "\n".join(lines)


def _ask_autoscaler(ray: Any, wanted: Request | None) -> None:
    """Tell an autoscaler what is wanted (None: nothing any more); without one this does nothing."""
    from ray.autoscaler.sdk import request_resources

    bundles: list[dict[str, float]] = []
    if wanted is not None:
        worker = {"CPU": wanted.cpus, "GPU": wanted.gpus, "memory": wanted.memory}
        bundles = [{k: v for k, v in worker.items() if v}] * wanted.num_workers
        if wanted.other_cpus:
            bundles.append({"CPU": wanted.other_cpus})
    with contextlib.suppress(Exception):
        # Only a hint: an old or absent autoscaler refuses it, and then the wait just ends.
        request_resources(bundles=[bundle for bundle in bundles if bundle])


def _resources(cpus: float, gpus: float) -> str:
    return f"{_amount(cpus, 'CPU')}, {_amount(gpus, 'GPU')}"


def _amount(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
