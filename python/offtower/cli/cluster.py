"""Options that run a verb on Ray."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Annotated

import typer

from offtower.errors import ConfigError
from offtower.execution import Execution
from offtower.progress import Progress

PANEL = "On Ray (extra 'ray')"

RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Run on Ray: local (a cluster for this command), auto (the one of this machine), "
        "HOST:PORT or ray://HOST:PORT. The results are those of one process.",
        rich_help_panel=PANEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Concurrent workers; as many as the cluster has room for without it."),
]
TrainingWorkers = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="R|MIN-MAX",
        help="Workers that share every batch (2 with --ray alone); with a range training continues "
        "on fewer workers after a node is lost.",
        rich_help_panel=PANEL,
    ),
]
WorkerCpus = Annotated[float, typer.Option(min=0.1, help="CPUs of each worker, and threads.")]
WorkerGpus = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="GPUs of each worker, 0 or 1; 1 where training.device is cuda.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
WorkerMemory = Annotated[
    float, typer.Option(min=0.0, metavar="GIB", help="Memory reserved for each worker; 0: none.")
]
RayWait = Annotated[
    float,
    typer.Option(min=0.0, metavar="SECONDS", help="Wait for an autoscaler to add nodes."),
]


def worker_range(text: str) -> int | tuple[int, int]:
    """Parse `4` or `2-8`.

    Raises:
        ConfigError: the text is neither.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if found is None:
        raise ConfigError(f"--workers '{text}' is neither a number (4) nor a range (2-8)")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


class _RayMessages(io.TextIOBase):
    """Writes what Ray prints to standard error, without the tails of logs in its messages.

    Ray prints on standard output, which is reserved for results. Its message of a lost node ends
    with 20 lines of the raylet's log, indented by four spaces.
    """

    def __init__(self) -> None:
        self._rest, self._tail = "", False

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._tail = self._tail and line.startswith("    ")
            if not self._tail:
                print(line, file=sys.stderr, flush=True)
            self._tail = self._tail or line.rstrip().endswith("lines of the Raylet logs:")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def cluster(address: str | None, workers: int, cpus: float) -> Iterator[None]:
    """Connect to the cluster of --ray, or start one on this machine with CPUs for `workers`."""
    from offtower.jobs.connect import connect

    with (
        redirect_stdout(_RayMessages()),
        connect(address or "local", num_cpus=max(1, math.ceil(workers * cpus))),
    ):
        yield


@dataclass(frozen=True)
class RayOptions:
    """The options that run a verb's passes on Ray."""

    ray: RayAddress = None
    workers: Workers = None
    worker_cpus: WorkerCpus = 1.0
    worker_memory: WorkerMemory = 0.0
    ray_wait: RayWait = 0.0

    @contextmanager
    def execution(self, progress: Progress, gpus: int = 0) -> Iterator[Execution]:
        """Connect the options' mapper; without --ray and --workers work runs in this process.

        Args:
            gpus: of each worker.

        Raises:
            ConfigError: options of Ray without --ray.
            ClusterError: no cluster, or no room on it.
            MissingExtraError: Ray is not installed.
        """
        if self.ray is None and self.workers is None:
            if self.ray_wait or self.worker_memory or self.worker_cpus != 1.0:
                raise ConfigError(
                    "--worker-cpus, --worker-memory and --ray-wait are options of --ray; add --ray "
                    "local, auto or an ADDRESS"
                )
            yield Execution(progress=progress)
            return
        from offtower.jobs.mapper import ray_mapper

        with (
            redirect_stdout(_RayMessages()),
            ray_mapper(
                self.ray or "local",
                self.workers,
                cpus=self.worker_cpus,
                gpus=gpus,
                memory=self.worker_memory * 2**30,
                wait=self.ray_wait,
                progress=progress,
            ) as mapper,
        ):
            yield Execution(mapper, progress)


IN_PROCESS = RayOptions()
"""No cluster: the default."""
