"""Reading speed if each worker read only its own row groups.

    python benchmarks/experiments/reader_split.py --rows 2000000

Reports the fraction of row groups that contain a row of a given worker in training order; other row
groups need not be read. Then reports what assigning the rows of a step to workers by row group
would change: the size of the largest part relative to an even one (a step waits for it), and the
time per row on one thread, for all columns and for those that a worker needs of other workers' rows
(item, reward, propensity). The result is an upper bound on rows per second for R workers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.encoding import FeatureEncoding
from offtower.data.loading import Loader
from offtower.data.log import ParquetLog, write_log
from offtower.data.order import EpochOrder, rank_slice
from offtower.data.reader import BatchReader
from offtower.data.simulate import LoggingPolicy, SimulatedWorld, WorldSettings

GROUP = 131_072
WINDOW = 1_048_576
WORKERS = (2, 8, 64, 512)


def share_of_groups(workers: int, batch: int, shuffle: bool) -> float:
    """Return the fraction of a window's row groups that contain a row of the first worker."""
    sizes = [GROUP] * (WINDOW // GROUP)
    order = EpochOrder(sizes, batch, seed=1, shuffle=shuffle, window_rows=WINDOW)
    touched: set[int] = set()
    for part in order.batches(0, 0, WINDOW):
        mine = part.index[rank_slice(part.index.size, 0, workers)]
        touched.update(np.unique(mine // GROUP).tolist())
    return len(touched) / len(sizes)


def largest_part(workers: int, batch: int) -> float:
    """Return the size of a step's largest part relative to an even one, a mean over steps.

    A window is split into one contiguous range of rows per worker.
    """
    order = EpochOrder([GROUP] * (WINDOW // GROUP), batch, seed=1, window_rows=WINDOW)
    found = [
        np.bincount(part.index * workers // WINDOW).max() * workers / part.index.size
        for part in order.batches(0, 0, WINDOW)
    ]
    return float(np.mean(found))


def seconds_of(log: ParquetLog, catalogue: Catalogue, encoding: FeatureEncoding) -> dict[str, Any]:
    """Return seconds per million rows, for all columns and for those that all workers need."""
    order = EpochOrder(log.row_group_sizes, 1024, seed=0)
    reader = BatchReader(Loader(log, catalogue, encoding), order, prefetch=False)
    schema = log.schema
    light = [schema.action, schema.reward, schema.pscore]
    whole, needed = [], []
    for group, rows in enumerate(log.row_group_sizes.tolist()):
        began = time.perf_counter()
        reader._loader.load([group], reader._loader.tables([[group]]), threading.Event())
        whole.append((time.perf_counter() - began) / rows)
        began = time.perf_counter()
        table = log.read_row_group(group, light)
        catalogue.index_of(table.column(schema.action))
        for name in light[1:]:
            table.column(name).to_numpy()
        needed.append((time.perf_counter() - began) / rows)
    return {
        "whole": 1e6 * float(np.median(whole)),
        "needed_of_others": 1e6 * float(np.median(needed)),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    groups = [
        {
            "workers": workers,
            "shuffled": share_of_groups(workers, args.batch, True),
            "in_file_order": share_of_groups(workers, args.batch, False),
            "largest_part": largest_part(workers, args.batch),
        }
        for workers in WORKERS
    ]
    settings = WorldSettings(args.dim, args.dim, feature_kinds="all")
    world = SimulatedWorld(1_000, settings, logging=LoggingPolicy("popularity"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_log(folder / "log", world.log(args.rows), world.log_schema, rows_per_group=GROUP)
        write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
        log, catalogue = ParquetLog.open(folder / "log"), Catalogue.open(folder / "catalogue")
        encoding = FeatureEncoding.fit(log.schema.context, [log.read_row_group(0)])
        seconds = seconds_of(log, catalogue, encoding)
    whole, needed = seconds["whole"], seconds["needed_of_others"]
    bounds = [
        {
            "workers": workers,
            "every_window": 1e6 / whole,
            "by_row_group": 1e6 / (needed + (whole - needed) / workers),
        }
        for workers in WORKERS
    ]
    return {"groups": groups, "seconds_a_million_rows": seconds, "rows_per_second": bounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=8, help="dimension of context vectors")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = run(args)
    if args.json:
        print(json.dumps(report))
        return
    print("fraction of a window's row groups with rows of one worker")
    for line in report["groups"]:
        print(
            f"{line['workers']:>6} workers  shuffled {line['shuffled']:.3f}"
            f"  in file order {line['in_file_order']:.3f}"
            f"  largest part by row group {line['largest_part']:.2f} x an even one"
        )
    seconds = report["seconds_a_million_rows"]
    print(
        f"seconds per million rows on one thread: all columns {seconds['whole']:.3f}, columns "
        f"needed of other workers' rows {seconds['needed_of_others']:.3f}"
    )
    for line in report["rows_per_second"]:
        print(
            f"{line['workers']:>6} workers  at most {line['every_window']:,.0f} rows/s, "
            f"by row group {line['by_row_group']:,.0f}"
        )


if __name__ == "__main__":
    main()
