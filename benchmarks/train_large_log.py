"""Rows per second and peak memory of an epoch over a log larger than memory.

Writes a simulated log (once), trains a policy for one epoch as `offtower train` does, and reports
rows per second and the peak resident memory of the training process.

    python benchmarks/train_large_log.py --rows 20000000 --json train_large_log.json
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.simulate import LoggingPolicy, SimulatedWorld, WorldSettings


def write(folder: Path, rows: int, items: int) -> float:
    began = time.perf_counter()
    settings = WorldSettings(8, 8, 8, feature_kinds="all")
    world = SimulatedWorld(items, settings, logging=LoggingPolicy("popularity"))
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    write_log(folder / "train", world.log(rows), world.log_schema)
    return time.perf_counter() - began


def train(folder: Path, objective: str, batch: int, threads: int) -> dict[str, Any]:
    """Train for one epoch; run in its own process, so that peak memory is that of training."""
    from offtower.metrics import read_metrics
    from offtower.training.run import train_run

    config = parse_config(
        {
            "name": "epoch",
            "runs": str(folder / "runs"),
            "data": {"train": str(folder / "train"), "catalogue": str(folder / "catalogue")},
            "policy": {
                "embedding_dim": 16,
                "context_tower": {"hidden_layer_sizes": [32]},
                "item_tower": {"hidden_layer_sizes": [32]},
            },
            "objective": {"name": objective},
            "training": {"epochs": 1, "batch_size": batch, "threads": threads},
        }
    )
    began = time.perf_counter()
    train_run(config)
    epoch = read_metrics(config.run_directory / "metrics.jsonl")[-1]
    return {
        "objective": objective,
        "seconds_in_all": time.perf_counter() - began,
        "rows_per_second": epoch["rows_per_second"],
        "waiting_share": epoch["waiting_share"],
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--objective", default="ips")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the log here, and reuse it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--train-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train_only:
        shutil.rmtree(arguments.folder / "runs", ignore_errors=True)
        print(
            json.dumps(
                train(arguments.folder, arguments.objective, arguments.batch, arguments.threads)
            )
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "train").exists():
            seconds = write(folder, arguments.rows, arguments.items)
            print(f"wrote {arguments.rows:,} rows in {seconds:.0f} s")
        command = [sys.executable, __file__, "--train-only", "--folder", str(folder)]
        for name in ("objective", "batch", "threads"):
            command += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    result |= {"rows": arguments.rows, "items": arguments.items, "batch": arguments.batch}
    print(
        f"{result['objective']}: {result['rows_per_second']:,.0f} rows/s in the epoch, "
        f"{result['seconds_in_all']:.0f} s in total, data wait {result['waiting_share']:.1%}, "
        f"peak memory {result['peak_memory_gib']:.2f} GiB"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
