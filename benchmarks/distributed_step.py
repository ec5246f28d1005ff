"""Time and traffic of a training step on several workers, and a projection to GPU clusters.

Workers are processes of this machine with one thread each, compared with one process with as many
threads. Traffic is read from the counters of the loopback device in a separate network namespace
(Linux, as root; elsewhere the column is empty) and compared with the formula of
docs/reference/cluster.md. With exact terms and `--calibrate`, so are the processor seconds of a
worker of `item_sharded`: f + s N / R + c(R), by runs with other catalogues than those compared.
f + s N is the line through one process with the smaller and the larger catalogue of `--calibrate`,
and c(R), which is for messages, what R workers take beyond it with the smaller one. The first
epoch, in which connections are made, is left out.
The projection combines the fixed part of the measured steps, the formula
and assumed rates of network and device, which are arguments.

    python benchmarks/distributed_step.py --items 10000 100000 1000000
    python benchmarks/distributed_step.py --strategies item_sharded --threads 1 --workers 2 4 8
    python benchmarks/distributed_step.py --terms sampled --items 100000 1000000 10000000
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import math
import shutil
import socket
import statistics
import struct
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from offtower.benchmarks import world
from offtower.config import SamplingConfig
from offtower.models.features import embedding_tables
from offtower.prepare import open_data, prepare
from offtower.progress import Progress
from offtower.training.setup import build_setup
from offtower.training.trainer import TrainingOutputs
from offtower.training.workers import SINGLE_PROCESS, TorchWorkers, Workers

EPOCHS = 4
"""Epochs per run; the first warms up."""
FLOAT = 4
STRATEGIES = ("replicated", "item_sharded")


def bytes_per_step(
    strategy: str, workers: int, batch: int, dim: int, parameters: int, candidates: int = 0
) -> float:
    """Return the bytes that one worker sends in a step of log-probabilities, forward and backward.

    The formula is in docs/reference/cluster.md.

    item_sharded: an all-gather of contexts and a reduce-scatter of their gradients ((R-1)/R B d
    numbers each), all-reduces of the largest logit, the normalizer's sum and the logged item's
    logit (3 B), and an all-reduce of the towers' gradients. Sampled terms send the same for any
    number of draws. A top-k proposal adds each row's `candidates` scores to the row's owner, and
    one back.
    """
    share = (workers - 1) / workers
    total = 2.0 * share * parameters
    if strategy == "item_sharded":
        total += share * 2.0 * batch * dim + 2.0 * share * 3.0 * batch
        total += share * batch * (candidates + 1) if candidates else 0.0
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
    """Return the bytes sent by the loopback device so far."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0


def prepared(workers: Workers, items: int, mode: str, args: argparse.Namespace) -> Any:
    """Return data in memory for exact terms; with an id table and in files for sampled terms."""
    if mode == "exact":
        log, catalogue = world.in_memory(args.batch * args.steps, items)
        return prepare(log, None, catalogue, Progress())
    folder = Path(args.folder) / str(items)
    config = world.config(mode, batch=args.batch, dim=args.dim, epochs=1, folder=folder)
    return workers.first_then_all(lambda: open_data(config, Progress(), folder / "run"))


def measure(
    workers: Workers, items: int, strategy: str, mode: str, args: argparse.Namespace
) -> dict[str, float]:
    """Train and return the figures of this worker.

    seconds, processor seconds and bytes (of all workers) are per step, parameters counts those
    that all workers hold, loss is the mean of the last epoch, and the same for any number of
    workers to float32 rounding. The MiB are those of id tables with their optimizer state, of
    anonymous memory and of peak resident memory.
    """
    config = world.config(mode, batch=args.batch, dim=args.dim, epochs=EPOCHS, strategy=strategy)
    began = time.monotonic()
    data = prepared(workers, items, mode, args)
    setup = build_setup(config, data, None, workers, Progress())
    ends: list[float] = []

    def ended(policy: Any, epoch: int) -> dict[str, float]:
        ends.append(time.process_time())
        return {}

    trainer = setup.trainer(TrainingOutputs(on_epoch_end=ended))
    workers.barrier()
    ready = time.monotonic()
    before = sent()
    result = trainer.fit()
    workers.barrier()
    after = sent()
    rates = [line["rows_per_second"] for line in result.history[1:]]
    optimizer = getattr(trainer._optimizer, "tables", trainer._optimizer)
    state = {id(p): s for p, s in optimizer.state.items()}
    tables = [table.weight for table in embedding_tables(setup.policy.item_tower)]
    kept = [t for w in tables for t in (w, *state.get(id(w), {}).values()) if t.numel() > 1]
    shared = sum(p.numel() for p in setup.policy.parameters())
    shared -= sum(w.numel() - w.shape[1] for w in tables)
    return {
        "seconds": args.batch / statistics.median(rates),
        "processor_seconds": (ends[-1] - ends[0]) / (len(ends) - 1) / args.steps,
        "bytes": (after - before) / result.steps,
        "parameters": shared,
        "tables_mib": sum(t.numel() * t.element_size() for t in kept) / 2**20,
        "anonymous_mib": memory("RssAnon"),
        "peak_mib": memory("VmHWM"),
        "seconds_to_start": ready - began,
        "loss": result.history[-1]["loss"],
    }


def memory(name: str) -> float:
    """Return the MiB of an entry in /proc/self/status (Linux; 0 elsewhere)."""
    path = Path("/proc/self/status")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**10
    return 0.0


def enter(rank: int, size: int, port: int, case: Any, args: argparse.Namespace) -> None:
    """Run one of `size` processes of one thread; a single one has `args.threads`."""
    torch.set_num_threads(1 if size > 1 else args.threads)
    workers = SINGLE_PROCESS
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=600),
        )
        workers = TorchWorkers()
    found = workers.gather_objects(measure(workers, *case, args))
    if rank == 0:
        largest = {key: max(part[key] for part in found) for key in found[0]}
        (Path(args.folder) / "found.json").write_text(json.dumps(largest), encoding="utf-8")
    if size > 1:
        dist.destroy_process_group()


def in_processes(size: int, case: Any, args: argparse.Namespace) -> dict[str, float]:
    """Run `measure` in `size` new processes and return the maximum of each figure."""
    args.port += 1
    mp.spawn(enter, (size, args.port, case, args), nprocs=size)
    found: dict[str, float] = json.loads((Path(args.folder) / "found.json").read_text())
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    counted = own_network()
    lines: list[dict[str, Any]] = []
    exact = args.terms == "exact"
    modes = ["exact"] if exact else args.proposals
    strategies = args.strategies if exact else ("item_sharded",)
    for items in args.items:
        if not exact:
            folder = Path(args.folder) / str(items)
            world.write(folder, args.batch * args.steps, items, args.id_dim)
        for mode in modes:
            one = in_processes(1, (items, "replicated", mode), args)
            for size in args.workers:
                for strategy in strategies:
                    case = (items, strategy, mode)
                    lines.append(line_of(size, case, one, in_processes(size, case, args), args))
                    if not counted:
                        lines[-1]["sent_bytes"] = None
        if not exact:
            shutil.rmtree(Path(args.folder) / str(items))
    report = {
        "workers": args.workers,
        "batch": args.batch,
        "dim": args.dim,
        "terms": args.terms,
        "id_dim": 0 if exact else args.id_dim,
        "steps": lines,
    }
    if exact:
        one = {line["items"]: line["one_process_ms"] / 1e3 for line in lines}
        fixed, slope = line_through(sorted(one.items()))
        report["projection"] = project(args, fixed, int(lines[0]["parameters"]))
        report["seconds_fixed"], report["seconds_per_item"] = fixed, slope
        if args.calibrate:
            report["calibration"] = predict(lines, args)
    return report


def predict(lines: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Add the predicted processor time to each line of `item_sharded`; return the constants."""
    small, large = sorted(args.calibrate)

    def taken(size: int, items: int) -> float:
        runs = [in_processes(size, (items, "item_sharded", "exact"), args) for _ in range(3)]
        return statistics.median(run["processor_seconds"] for run in runs)

    fixed, slope = line_through([(items, taken(1, items)) for items in (small, large)])
    messages = {size: taken(size, small) - fixed - slope * small / size for size in args.workers}
    for line in lines:
        if line["strategy"] == "item_sharded":
            share = slope * line["items"] / line["workers"]
            line["predicted_processor_ms"] = 1e3 * (fixed + share + messages[line["workers"]])
    return {
        "items": [small, large],
        "fixed_ms": 1e3 * fixed,
        "microseconds_per_item": 1e6 * slope,
        "messages_ms": {size: 1e3 * seconds for size, seconds in messages.items()},
    }


def line_of(
    workers: int,
    case: tuple[int, str, str],
    one: dict[str, float],
    found: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return a line of the report, which compares the workers with one process."""
    items, strategy, mode = case
    candidates = SamplingConfig().top_k if mode == "top_k" else 0
    parameters = int(found["parameters"])
    return {
        "workers": workers,
        "items": items,
        "strategy": strategy,
        "terms": mode,
        "one_process_ms": 1e3 * one["seconds"],
        "workers_ms": 1e3 * found["seconds"],
        "overhead_ms": 1e3 * (found["seconds"] - one["seconds"]),
        "processor_ms": 1e3 * found["processor_seconds"],
        "sent_bytes": found["bytes"] / workers,
        "formula_bytes": bytes_per_step(
            strategy, workers, args.batch, args.dim, parameters, candidates
        ),
        "parameters": parameters,
        "one_process": one,
        "worker": found,
    }


def line_through(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Return (intercept, slope) of the line through the first and the last point."""
    (a, s), (b, t) = points[0], points[-1]
    slope = (t - s) / (b - a) if b > a else 0.0
    return max(s - slope * a, 0.0), slope


def project(args: argparse.Namespace, fixed: float, parameters: int) -> list[dict[str, Any]]:
    """Project `item_sharded` steps to GPUs.

    The fixed part is measured here; terms and messages (7 collectives of log2 R latencies each) use
    the assumed rates.
    """
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
        f"Workers of one thread, B = {report['batch']}, d = {report['dim']}; "
        "milliseconds and bytes per step (bytes: sent by one worker)"
    )
    for line in report["steps"]:
        real = "-" if line["sent_bytes"] is None else f"{line['sent_bytes']:,.0f}"
        print(
            f"{line['items']:>10,} {line['workers']} x {line['strategy']:<13}{line['terms']:<10} "
            f"one process "
            f"{line['one_process_ms']:9.2f}  workers {line['workers_ms']:9.2f}  overhead "
            f"{line['overhead_ms']:7.2f}  sent {real:>12}  formula {line['formula_bytes']:>12,.0f}"
        )
        if "predicted_processor_ms" in line:
            print(
                f"{'processor ms of a worker':>40}: {line['processor_ms']:.1f}, predicted "
                f"{line['predicted_processor_ms']:.1f}"
            )
        for name in ("one_process", "worker"):
            of = line[name]
            print(
                f"{name:>40}: MiB of id table and optimizer state {of['tables_mib']:.0f}, "
                f"anonymous {of['anonymous_mib']:.0f}, peak resident {of['peak_mib']:.0f}; "
                f"{of['seconds_to_start']:.1f} s to the first step, loss {of['loss']:.7f}"
            )
    if "calibration" in report:
        print(f"calibration: {report['calibration']}")
    if "projection" not in report:
        return
    print("projection, item_sharded:")
    for line in report["projection"]:
        print(
            f"{line['gpus']:>5} GPUs  step {line['step_ms']:8.2f} ms (terms "
            f"{line['terms_ms']:.2f}, messages {line['messages_ms']:.2f}, fixed "
            f"{line['fixed_ms']:.2f})  {line['rows_per_second']:>12,.0f} rows/s  "
            f"efficiency {line['efficiency']:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--terms", choices=["exact", "sampled"], default="exact")
    parser.add_argument("--proposals", nargs="+", default=["mixed"], help="for sampled terms")
    parser.add_argument(
        "--id-dim", type=int, default=16, help="width of the id table with sampled terms"
    )
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument(
        "--steps", type=int, help="per epoch; by default 4, or 16 with sampled terms"
    )
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--threads", type=int, help="of the one process; by default the least number of workers"
    )
    parser.add_argument(
        "--calibrate",
        type=int,
        nargs=2,
        metavar="ITEMS",
        help="two catalogues, of exact terms, that the processor time of others is predicted by",
    )
    parser.add_argument("--gpu-items", type=float, default=1e8)
    parser.add_argument("--gpu-batch", type=int, default=8192)
    parser.add_argument(
        "--gpu-cells",
        type=float,
        default=7.9e11,
        help="assumed rows x items per second of a device, forward and backward (1024 x 1e6 in "
        "1.3 ms, a goal, not a measurement)",
    )
    parser.add_argument("--bandwidth", type=float, default=40e9, help="bytes per second of a GPU")
    parser.add_argument("--latency", type=float, default=15e-6, help="seconds per message")
    parser.add_argument("--json", help="file for the figures, - for standard output")
    args = parser.parse_args()
    args.steps = args.steps or (4 if args.terms == "exact" else 16)
    args.threads = args.threads or min(args.workers)
    args.port = 29_641
    with tempfile.TemporaryDirectory(prefix="offtower-step-") as args.folder:
        report = run(args)
    if args.json == "-":
        print(json.dumps(report))
        return
    show(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
