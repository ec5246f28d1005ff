"""Runs a function in several processes that share a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from offtower.training.workers import TorchWorkers, Workers

TIMEOUT = timedelta(seconds=120)

# A process is a fork of one that has imported all of this, and has no threads yet.
START = "forkserver"
multiprocessing.set_forkserver_preload(
    ["offtower.training.run", "sklearn.cluster", "tests.training.conftest"]
)


def run_workers(
    size: int, work: Callable[..., None], *arguments: Any, timeout: timedelta = TIMEOUT
) -> None:
    """`work(workers, *arguments)` in each of `size` processes; an error of one is raised here."""
    mp.start_processes(
        _enter, (size, _free_port(), work, arguments, timeout), nprocs=size, start_method=START
    )


def start_offtower(arguments: list[str], errors: Path) -> BaseProcess:
    """Start `offtower ...` in a process of its own, without the seconds that imports take; what it
    writes to stderr goes to a file."""
    context = multiprocessing.get_context(START)
    process = context.Process(target=_command, args=(arguments, errors))
    process.start()
    return process


def _command(arguments: list[str], errors: Path) -> None:
    from offtower.cli import main

    # A shell that started the tests in the background has them ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(errors, "wb") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = ["offtower", *arguments]
    main()


def of_each_size(largest: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    """`work(workers, *arguments)` with 1, 2, ... `largest` workers, in one set of processes; what
    it returns is stored as <folder>/<workers>-<rank>.pt."""
    run_workers(largest, _sizes, work, folder, arguments)


def _sizes(workers: Workers, work: Callable[..., Any], folder: Path, arguments: Any) -> None:
    for size in range(1, workers.size + 1):
        group, readers = (dist.new_group(list(range(size)), timeout=TIMEOUT) for _ in range(2))
        if workers.rank < size:
            part = TorchWorkers(TIMEOUT, group, readers)
            torch.save(work(part, *arguments), folder / f"{size}-{part.rank}.pt")
        workers.barrier()


def _enter(
    rank: int, size: int, port: int, work: Callable[..., None], arguments: Any, timeout: timedelta
) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=size, timeout=timeout
    )
    work(TorchWorkers(timeout), *arguments)
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
