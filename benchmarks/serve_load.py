"""Latency and throughput of `offtower serve` on loopback, and a swap of exports under load.

Trains a policy on features over 20,000 items, exports a catalogue of --items of the same world, and
sends requests of one context each over --connections connections that wait for their answers
(a closed loop). Client and server share the machine's cores.

    python benchmarks/serve_load.py --items 1000000 --json serve_load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.retrieval import ExportOptions, IndexOptions, export_run
from offtower.retrieval.manifest import set_current
from offtower.training.run import train_run

HOST = "127.0.0.1"
KINDS = WorldSettings(16, 16, 16, feature_kinds="all")


@dataclass(frozen=True)
class Cell:
    """A kind of request at a number of connections.

    p50, p99: milliseconds from a request to its answer. cpu: milliseconds of the server's
    processor time for a request, which other processes of the machine do not change.
    """

    verb: str
    connections: int
    requests: int
    failed: int
    per_second: float
    p50: float
    p99: float
    cpu: float
    contexts_per_call: float


def prepare(folder: Path, items: int, dim: int) -> tuple[Path, list[str]]:
    """Return a run directory, and the names of two exports of the large catalogue."""
    run = folder / "runs" / "load"
    if (folder / "exports.json").exists():
        return run, json.loads((folder / "exports.json").read_text())
    small = SimulatedWorld(20_000, KINDS)
    write_catalogue(folder / "small", small.catalogue_table(), small.catalogue_schema)
    write_log(folder / "train", small.log(40_000, seed=1), small.log_schema)
    large = SimulatedWorld(items, KINDS)
    write_catalogue(folder / "large", large.catalogue_table(), large.catalogue_schema)
    config = parse_config(
        {
            "name": "load",
            "runs": str(folder / "runs"),
            "data": {"train": str(folder / "train"), "catalogue": str(folder / "small")},
            "policy": {
                "embedding_dim": dim,
                "item_bias": True,
                "context_tower": {"hidden_layer_sizes": [64]},
                "item_tower": {"hidden_layer_sizes": [64]},
            },
            "objective": {"name": "weighted_likelihood"},
            "training": {"epochs": 2, "learning_rate": 0.003},
        }
    )
    train_run(config)
    names = []
    for index in (None, IndexOptions(k=10, target_recall=0.95)):
        options = ExportOptions(index=index, onnx=False, contexts=200, kept=5)
        made = export_run(config.run_directory, options, catalogue=str(folder / "large"))
        names.append(made.name)
    (folder / "exports.json").write_text(json.dumps(names))
    return run, names


async def load(port: int, verb: str, bodies: list[bytes], connections: int, seconds: float) -> Any:
    """Send requests for some seconds; return milliseconds of those answered, and failures."""
    times: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection(HOST, port)
        for body in cycle(bodies[number::connections] or bodies):
            if time.perf_counter() > end:
                break
            begun = time.perf_counter()
            head = f"POST /{verb} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer.lower())
            assert length is not None
            await reader.readexactly(int(length[1]))
            if answer.split(b" ", 2)[1] == b"200":
                times.append(1000.0 * (time.perf_counter() - begun))
            else:
                failed += 1
        writer.close()

    await asyncio.gather(*map(client, range(connections)))
    return np.array(times), failed


async def get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
    found = (await reader.read()).decode()
    writer.close()
    return found


async def contexts_and_calls(port: int, verb: str) -> tuple[float, float]:
    """Contexts answered so far, and calls of the retriever."""
    text = await get(port, "/metrics")
    found = [
        re.search(rf'offtower_batch_contexts_{part}\{{verb="{verb}"\}} (\S+)', text)
        for part in ("sum", "count")
    ]
    sums = [0.0 if one is None else float(one[1]) for one in found]
    return sums[0], sums[1]


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(
    server: tuple[int, int], verb: str, bodies: list[bytes], connections: int, seconds: float
) -> Cell:
    port, process = server
    await load(port, verb, bodies, connections, min(1.0, seconds))
    before = await contexts_and_calls(port, verb)
    begun, used = time.perf_counter(), cpu_seconds(process)
    times, failed = await load(port, verb, bodies, connections, seconds)
    taken, used = time.perf_counter() - begun, cpu_seconds(process) - used
    contexts, calls = np.subtract(await contexts_and_calls(port, verb), before)
    p50, p99 = np.percentile(times, [50, 99])
    rate, cpu = len(times) / taken, 1000.0 * used / len(times)
    per_call = contexts / max(calls, 1.0)
    return Cell(verb, connections, len(times), failed, rate, p50, p99, cpu, per_call)


async def swapped(
    port: int, bodies: list[bytes], exports: Path, names: list[str], seconds: float
) -> dict[str, float]:
    """Swap the exports each second under load; return swaps, requests and failures."""
    running = asyncio.create_task(load(port, "sample", bodies, 8, seconds))
    swaps = 0
    for name in cycle(names):
        set_current(exports, name)
        while not running.done() and name not in await get(port, "/health"):
            await asyncio.sleep(0.05)
        if running.done():
            break
        swaps += 1
        await asyncio.sleep(0.5)
    times, failed = await running
    p99 = float(np.percentile(times, 99))
    return {"swaps": swaps, "requests": len(times), "failed": failed, "p99": p99}


async def run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    directory, names = prepare(folder, given.items, given.dim)
    contexts = SimulatedWorld(20_000, KINDS).contexts(512, seed=9)
    users = pa.array([f"user {row}" for row in range(512)])
    rows = contexts.append_column("user_id", users).to_pylist()
    bodies = [json.dumps({"contexts": row, "k": given.k}).encode() for row in rows]
    command = [sys.executable, "-m", "offtower.cli", "serve", str(directory), "--port", "0"]
    command += ["--log", str(folder / "served"), "--poll", "0.2", "--timeout", "60"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        port = next(
            int(found[1])
            for line in server.stderr
            if (found := re.search(rf"http://{HOST}:(\d+)", line))
        )
        cells = []
        for verb in ("search", "sample"):
            for connections in given.connections:
                cell = await measure((port, server.pid), verb, bodies, connections, given.seconds)
                cells.append(asdict(cell))
                print(json.dumps(cells[-1]), flush=True)
        swap = await swapped(port, bodies, directory / "export", names, 2 * given.seconds)
        print(json.dumps(swap), flush=True)
        memory = Path(f"/proc/{server.pid}/status").read_text()
    finally:
        server.terminate()
        server.wait(60)
    peak = re.search(r"VmHWM:\s+(\d+)", memory)
    return {
        "items": given.items,
        "dim": given.dim,
        "k": given.k,
        "machine": platform.machine(),
        "cells": cells,
        "swap": swap,
        "peak_mib": int(peak[1]) // 1024 if peak else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each cell")
    parser.add_argument("--folder", type=Path, help="keeps the run and its exports for next time")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="offtower-load-") as temporary:
        found = asyncio.run(run(given.folder or Path(temporary), given))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
