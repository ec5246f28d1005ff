"""Peak memory of an export by catalogue size: vectors and Parquet, cells, a sharded index.

Each export runs in its own process. "own" is the peak of its anonymous memory (RssAnon) minus that
at the start; "resident" includes pages of mapped files, which the system can reclaim.

    python benchmarks/export_memory.py --items 100000 1000000 4000000 --json export_memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from offtower.benchmarks import world
from offtower.data import write_catalogue
from offtower.retrieval import ExportOptions, IndexOptions, export_run
from offtower.training.run import train_run

PARTS: dict[str, dict[str, Any]] = {
    "vectors and Parquet": {"index": None, "sampling": False},
    "and cells": {"index": None, "sampling": True},
    "and ivf_sq8, shards of 250,000": {
        "index": IndexOptions(kind="ivf_sq8", shard_rows=250_000, lists=1000),
        "sampling": False,
    },
}


class MemoryMonitor(threading.Thread):
    """Sample RssAnon and VmRSS, and keep their maxima in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own, self.resident, self.over = 0.0, 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.01):
            now = status()
            self.own = max(self.own, now["RssAnon"])
            self.resident = max(self.resident, now["VmRSS"])


def status() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    parts = [line.split() for line in lines if line.startswith(("RssAnon", "VmRSS"))]
    return {part[0].rstrip(":"): int(part[1]) / 1024 for part in parts}


def export(run: Path, catalogue: Path, part: str) -> dict[str, Any]:
    before, watch = status()["RssAnon"], MemoryMonitor()
    began = time.perf_counter()
    path = export_run(run, ExportOptions(onnx=False, kept=1, **PARTS[part]), catalogue=catalogue)
    seconds = time.perf_counter() - began
    watch.over.set()
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "own_mib": watch.own - before,
        "resident_mib": watch.resident,
        "seconds": seconds,
        "disk_mib": size / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--folder", type=Path, help="keep runs and catalogues here, and reuse them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        run, catalogue, part = arguments.one
        print(json.dumps(export(Path(run), Path(catalogue), part)))
        return
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "small").exists():
            world.write(folder / "small", 20_000, 10_000, None)
        config = world.config(
            "uniform", batch=1024, dim=arguments.dim, epochs=1, folder=folder / "small"
        )
        if not (config.run_directory / "policy").exists():
            train_run(config)
        for items in arguments.items:
            path = folder / f"catalogue-{items}"
            if not path.exists():
                write_catalogue(path, world.make_items(items), world.catalogue_schema(None))
            for part in arguments.parts:
                command = [sys.executable, __file__, "--one"]
                command += [str(config.run_directory), str(path), part]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    raise SystemExit(done.stderr[-2000:])
                line = {"items": items, "part": part, **json.loads(done.stdout.splitlines()[-1])}
                results.append(line)
                print(json.dumps(line), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
