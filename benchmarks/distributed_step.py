"""A training step on several workers: its time, what it sends, and what that means for larger ones.

Workers are processes of this machine with one thread each, beside one process with as many threads.
What is sent is read from the counters of the loopback device in a network namespace of the
benchmark's own (Linux, as root; elsewhere the column is empty), and compared with the formula of
docs/cluster.md. The projection takes the fixed part of the measured steps, the formula for what is
sent, and a network and a device as assumed by its arguments.

    python benchmarks/distributed_step.py --items 10000 100000 1000000
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import math
import os
import socket
import statistics
import struct
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from offtower.benchmarks import world
from offtower.prepare import prepare
from offtower.progress import Progress
from offtower.training.distributed import ALONE, TorchWorkers, Workers
from offtower.training.setup import build_setup

EPOCHS = 4
"""The first warms up."""
FLOAT = 4
STRATEGIES = ("replicated", "item_sharded")


def bytes_per_step(strategy: str, workers: int, batch: int, dim: int, parameters: int) -> float:
    """Sent by one worker in a step of log-probabilities, forward and backward; docs/cluster.md.

    item_sharded: contexts are gathered and their gradients summed to their owners (each (R-1)/R B d
    numbers), the largest logit, the normaliser's sum and the shown item's logit are summed over
    workers (3 B), and so are the towers' gradients.
    """
    share = (workers - 1) / workers
    total = 2.0 * share * parameters
    if strategy == "item_sharded":
        total += share * 2.0 * batch * dim + 2.0 * share * 3.0 * batch
    return FLOAT * total


def own_network() -> bool:
    """Move this process into a network namespace with a loopback device only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(0x40000000) != 0:
        return False
    with socket.socket() as probe:
        up_running_loopback = 0x1 | 0x40 | 0x8
        request = struct.pack("16sH14s", b"lo", up_running_loopback, b"")
        fcntl.ioctl(probe, 0x8914, request)
    return True


def sent() -> int:
    """Bytes that the loopback device has sent."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0


def measure(workers: Workers, items: int, strategy: str, args: argparse.Namespace) -> Any:
    """Seconds of a step, bytes of a step over all workers, and the towers' parameters."""
    log, catalogue = world.in_memory(args.batch * args.steps, items)
    config = world.config("exact", batch=args.batch, dim=args.dim, epochs=EPOCHS, strategy=strategy)
    data = prepare(log, None, catalogue, Progress())
    setup = build_setup(config, data, None, workers, Progress())
    trainer = setup.trainer()
    workers.barrier()
    before = sent()
    result = trainer.fit()
    workers.barrier()
    rates = [line["rows_per_second"] for line in result.history[1:]]
    return {
        "seconds": args.batch / statistics.median(rates),
        "bytes": (sent() - before) / result.steps,
        "parameters": sum(p.numel() for p in setup.policy.parameters()),
    }


def enter(rank: int, size: int, port: int, place: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=300),
    )
    workers = TorchWorkers()
    found = {}
    for items in args.items:
        for strategy in STRATEGIES:
            found[f"{strategy} {items}"] = measure(workers, items, strategy, args)
    if rank == 0:
        Path(place).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> dict[str, Any]:
    counted = own_network()
    lines: list[dict[str, Any]] = []
    torch.set_num_threads(args.workers)
    one = {n: measure(ALONE, n, "replicated", args) for n in args.items}
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, "found.json")
        mp.spawn(enter, (args.workers, 29_641, place, args), nprocs=args.workers)
        many = json.loads(Path(place).read_text(encoding="utf-8"))
    for items in args.items:
        for strategy in STRATEGIES:
            found = many[f"{strategy} {items}"]
            formula = bytes_per_step(
                strategy, args.workers, args.batch, args.dim, found["parameters"]
            )
            lines.append(
                {
                    "items": items,
                    "strategy": strategy,
                    "one_process_ms": 1e3 * one[items]["seconds"],
                    "workers_ms": 1e3 * found["seconds"],
                    "overhead_ms": 1e3 * (found["seconds"] - one[items]["seconds"]),
                    "sent_bytes": found["bytes"] / args.workers if counted else None,
                    "formula_bytes": formula,
                }
            )
    fixed, slope = line_through([(n, one[n]["seconds"]) for n in args.items])
    return {
        "workers": args.workers,
        "batch": args.batch,
        "dim": args.dim,
        "steps": lines,
        "projection": project(args, fixed, one[args.items[0]]["parameters"]),
        "seconds_fixed": fixed,
        "seconds_per_item": slope,
    }


def line_through(points: list[tuple[int, float]]) -> tuple[float, float]:
    """(intercept, slope) by the ends: the fixed part of a step, and what an item adds."""
    (a, s), (b, t) = points[0], points[-1]
    slope = (t - s) / (b - a) if b > a else 0.0
    return max(s - slope * a, 0.0), slope


def project(args: argparse.Namespace, fixed: float, parameters: int) -> list[dict[str, Any]]:
    """Steps of `item_sharded` on GPUs: fixed part as measured here, terms at the assumed rate, and
    messages over the assumed network (7 collectives, each log2 R latencies)."""
    lines = []
    for gpus in (8, 16, 32, 64, 128, 256, 512):
        terms = args.gpu_batch * args.gpu_items / gpus / args.gpu_cells
        bytes_sent = bytes_per_step("item_sharded", gpus, args.gpu_batch, args.dim, parameters)
        messages = bytes_sent / args.bandwidth + 7 * math.log2(gpus) * args.latency
        total = fixed + terms + messages
        lines.append(
            {
                "gpus": gpus,
                "terms_ms": 1e3 * terms,
                "messages_ms": 1e3 * messages,
                "fixed_ms": 1e3 * fixed,
                "step_ms": 1e3 * total,
                "rows_per_second": args.gpu_batch / total,
                "efficiency": terms / total,
            }
        )
    return lines


def show(report: dict[str, Any]) -> None:
    print(
        f"{report['workers']} workers of one thread, B = {report['batch']}, d = {report['dim']}; "
        "milliseconds and bytes a step (bytes: sent by one worker)"
    )
    for line in report["steps"]:
        real = "-" if line["sent_bytes"] is None else f"{line['sent_bytes']:,.0f}"
        print(
            f"{line['items']:>10,} {line['strategy']:<13} one process {line['one_process_ms']:9.2f}"
            f"  workers {line['workers_ms']:9.2f}  overhead {line['overhead_ms']:7.2f}"
            f"  sent {real:>12}  formula {line['formula_bytes']:>12,.0f}"
        )
    print("projection, item_sharded:")
    for line in report["projection"]:
        print(
            f"{line['gpus']:>5} GPUs  step {line['step_ms']:8.2f} ms (terms "
            f"{line['terms_ms']:.2f}, messages {line['messages_ms']:.2f}, fixed "
            f"{line['fixed_ms']:.2f})  {line['rows_per_second']:>12,.0f} rows/s  "
            f"terms' share {line['efficiency']:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="steps of an epoch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu-items", type=float, default=1e8)
    parser.add_argument("--gpu-batch", type=int, default=8192)
    parser.add_argument(
        "--gpu-cells",
        type=float,
        default=7.9e11,
        help="rows x items that a device does in a second, forward and backward (an aim: 1024 x "
        "1e6 in 1.3 ms; not measured)",
    )
    parser.add_argument("--bandwidth", type=float, default=40e9, help="bytes a second of a GPU")
    parser.add_argument("--latency", type=float, default=15e-6, help="seconds of a message")
    parser.add_argument("--json", help="file for the figures, - for standard output")
    args = parser.parse_args()
    report = run(args)
    if args.json == "-":
        print(json.dumps(report))
        return
    show(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
