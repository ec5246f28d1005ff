"""Bytes that each worker reads, sends and receives, and rows/s, when workers read a log together.

    python benchmarks/shared_reading.py --rows 400000 --workers 1 2 4 8 --json shared_reading.json

Each worker is a process with one thread; it reads two epochs without training. Bytes read are the
process's own (rchar of /proc/self/io) in the first epoch; in the second, row groups are mapped from
the cache. Predicted are 1/R of the log and (R-1)/R n (j + c/R) bytes sent, for n rows of j encoded
bytes without their contexts and c of contexts (docs/reference/cluster.md), more for a worker with
more than 1/R of the row groups.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster_sizing import LogSizes
from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.encoded_cache import EncodedCache
from offtower.data.encoding import FeatureEncoding, nbytes
from offtower.data.loading import Loader
from offtower.data.log import ParquetLog, write_log
from offtower.data.order import EpochOrder
from offtower.data.reader import BatchReader, scan
from offtower.data.simulate import LoggingPolicy, SimulatedWorld, WorldSettings
from offtower.training.workers import SINGLE_PROCESS, TorchWorkers, Workers


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def measure(workers: Workers, folder: Path, batch: int) -> dict[str, Any]:
    log, catalogue = ParquetLog.open(folder / "log"), Catalogue.open(folder / "catalogue")
    encoding = FeatureEncoding.fit(log.schema.context, log.tables())
    order = EpochOrder(log.row_group_sizes, batch, seed=0, window_rows=max(1, log.num_rows // 4))
    loader = Loader(log, catalogue, encoding, cache=EncodedCache(2**32))
    exchange = workers.exchange_of_readers()
    sent = [0]
    if exchange is not None:
        original = exchange.all_to_all

        def counting(parts: Any) -> Any:
            sent[0] += sum(len(p) for rank, p in enumerate(parts) if rank != workers.rank)
            return original(parts)

        exchange.all_to_all = counting  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    with BatchReader(loader, order, exchange=exchange) as reader:
        for epoch in range(2):
            workers.barrier()
            before, sent[0], began = bytes_read(), 0, time.perf_counter()
            for _ in reader.epoch(epoch, rank=workers.rank, world_size=workers.size):
                pass
            workers.barrier()
            seconds = time.perf_counter() - began
            found[f"epoch {epoch + 1}"] = {
                "bytes_read": bytes_read() - before,
                "bytes_sent": sent[0],
                "rows_per_second": log.num_rows / seconds,
            }
    rows = next(scan(log, catalogue, encoding, 1_024))
    context = nbytes(rows.context) / len(rows)
    shared = rows.nbytes / len(rows) - context
    own = log.row_group_sizes[workers.rank :: workers.size].sum() / log.num_rows
    predicted = LogSizes(log.num_rows, 0.0, shared, context).sent(workers.size)
    predicted *= float(own) * workers.size
    for numbers in found.values():
        numbers["predicted_sent"] = predicted
    return found


def worker(rank: int, size: int, folder: Path, batch: int) -> None:
    torch.set_num_threads(1)
    if size == 1:
        workers = SINGLE_PROCESS
    else:
        store = f"file://{folder}/group-{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        workers = TorchWorkers()
    found = workers.gather_objects(measure(workers, folder, batch))
    if rank == 0:
        (folder / f"{size}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--rows-per-group", type=int, default=8_192)
    parser.add_argument("--batch", type=int, default=4_096)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = WorldSettings(feature_kinds="all")
        world = SimulatedWorld(1_000, settings, logging=LoggingPolicy("popularity"))
        write_log(
            *(folder / "log", world.log(arguments.rows), world.log_schema),
            rows_per_group=arguments.rows_per_group,
        )
        write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
        result["log_bytes"] = sum(f.stat().st_size for f in (folder / "log").rglob("*.parquet"))
        for size in arguments.workers:
            mp.start_processes(worker, (size, folder, arguments.batch), size, start_method="spawn")
            found = json.loads((folder / f"{size}.json").read_text())
            result[str(size)] = {
                epoch: {key: [one[epoch][key] for one in found] for key in found[0][epoch]}
                for epoch in found[0]
            }
            for epoch, numbers in result[str(size)].items():
                most = max(numbers["bytes_read"]) / result["log_bytes"]
                print(
                    f"{size} workers, {epoch}: at most {most:.3f} of the log read by a worker, "
                    f"{max(numbers['bytes_sent']) / arguments.rows:.1f} B sent per row of the log "
                    f"(predicted {max(numbers['predicted_sent']) / arguments.rows:.1f}), "
                    f"{min(numbers['rows_per_second']):,.0f} rows/s"
                )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
