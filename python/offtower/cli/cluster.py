"""The options that run a verb's work on Ray, and the mapper that they stand for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated

import typer

from offtower.errors import ConfigError
from offtower.mapping import Mapper
from offtower.progress import Progress

_PANEL = "On Ray (extra 'ray')"

RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Run on Ray: local (a cluster for this command), auto (the one of this machine), "
        "HOST:PORT or ray://HOST:PORT. The results are those of one process.",
        rich_help_panel=_PANEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Workers at the same time; as many as there is room for without it."),
]
WorkerCpus = Annotated[float, typer.Option(min=0.1, help="CPUs of each worker, and threads.")]
WorkerMemory = Annotated[
    float, typer.Option(min=0.0, metavar="GIB", help="Memory promised to each worker; 0: none.")
]
RayWait = Annotated[
    float, typer.Option(min=0.0, metavar="SECONDS", help="Let an autoscaler add nodes for so long.")
]


@contextmanager
def mapper_of(
    address: str | None,
    workers: int | None,
    cpus: float,
    memory: float,
    wait: float,
    progress: Progress,
) -> Iterator[Mapper]:
    """A mapper as the options say: plain without --ray and --workers.

    Raises:
        ClusterError: no cluster, or no room on it.
        MissingExtraError: Ray is not installed.
    """
    if address is None:
        if workers is None and (wait or memory or cpus != 1.0):
            raise ConfigError(
                "--worker-cpus, --worker-memory and --ray-wait are options of --ray; add --ray "
                "local, auto or an ADDRESS"
            )
        if workers is None:
            yield Mapper()
            return
    from offtower.jobs.mapper import ray_mapper

    # Ray says on standard output which workers it lost; that is for people, like our messages.
    with (
        redirect_stdout(sys.stderr),
        ray_mapper(
            address or "local",
            workers,
            cpus=cpus,
            memory=memory * 2**30,
            wait=wait,
            progress=progress,
        ) as mapper,
    ):
        yield mapper
