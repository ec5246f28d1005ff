"""Speed of writing and reading a log, and the reader's peak memory.

    python benchmarks/reader_throughput.py --rows 2000000 --json

Writes a simulated log (unless --log names one from an earlier run), then reads epochs of it in its
own process, so that peak memory is the reader's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch


def write(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from offtower.data.catalogue import write_catalogue
    from offtower.data.log import write_log
    from offtower.data.simulate import LoggingPolicy, SimulatedWorld, WorldSettings

    world = SimulatedWorld(
        arguments.items,
        WorldSettings(feature_kinds=arguments.features),
        # Drawing from a softmax over all items would dominate the time.
        logging=LoggingPolicy("popularity"),
    )
    began = time.perf_counter()
    write_log(path / "log", world.log(arguments.rows), world.log_schema)
    seconds = time.perf_counter() - began
    write_catalogue(path / "catalogue", world.catalogue_table(), world.catalogue_schema)
    size = sum(file.stat().st_size for file in (path / "log").rglob("*.parquet"))
    return {
        "write_rows_per_second": arguments.rows / seconds,
        "bytes_per_row_on_disk": size / arguments.rows,
    }


def read(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from offtower.data.catalogue import Catalogue
    from offtower.data.encoding import FeatureEncoding
    from offtower.data.loading import Loader
    from offtower.data.log import ParquetLog
    from offtower.data.order import EpochOrder
    from offtower.data.reader import BatchReader

    log = ParquetLog.open(path / "log")
    catalogue = Catalogue.open(path / "catalogue")
    began = time.perf_counter()
    encoding = FeatureEncoding.fit(
        log.schema.context,
        (log.read_row_group(i) for i in range(len(log.row_group_sizes))),
    )
    fit_seconds = time.perf_counter() - began
    before = _peak()
    order = EpochOrder(
        log.row_group_sizes,
        arguments.batch_size,
        seed=0,
        window_rows=arguments.window_rows,
        num_folds=arguments.folds,
    )
    reader = BatchReader(
        Loader(log, catalogue, encoding), order, prefetch=not arguments.no_prefetch
    )
    rows, seconds, epochs = 0, 0.0, []
    for epoch in range(arguments.epochs):
        waited = reader.seconds_waiting
        began = time.perf_counter()
        for _, part, _ in reader.epoch(epoch):
            rows += len(part.action)
            if arguments.work_ms:
                time.sleep(arguments.work_ms / 1000)
        seconds = time.perf_counter() - began
        epochs.append(
            {
                "rows_per_second": log.num_rows / seconds,
                "waiting_share": (reader.seconds_waiting - waited) / seconds,
            }
        )
    assert rows == arguments.epochs * log.num_rows
    return {
        "rows": log.num_rows,
        "batch_size": arguments.batch_size,
        "window_rows": arguments.window_rows,
        "fit_rows_per_second": log.num_rows / fit_seconds,
        "epochs": epochs,
        "peak_mib_before_reading": before,
        "peak_mib": _peak(),
    }


def _peak() -> float:
    """Return the peak resident memory in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--items", type=int, default=1_000)
    parser.add_argument("--features", choices=["vector", "all"], default="all")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--window-rows", type=int, default=1_048_576)
    parser.add_argument("--folds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work-ms", type=float, default=0.0, help="sleep after each batch")
    parser.add_argument("--no-prefetch", action="store_true")
    parser.add_argument("--log", type=Path, help="keep the log in this directory, and reuse it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage", choices=["all", "write", "read"], default="all")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pa.set_cpu_count(arguments.threads)
    if arguments.stage != "all":
        stage = write if arguments.stage == "write" else read
        print(json.dumps(stage(arguments.log, arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.log or Path(temporary) / "data"
        result: dict[str, Any] = {"threads": arguments.threads, "items": arguments.items}
        for stage_name in ("write", "read"):
            if stage_name == "write" and (path / "log").exists():
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage_name]
            command += ["--log", str(path)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result |= json.loads(output.splitlines()[-1])
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:28} {value}")


if __name__ == "__main__":
    main()
