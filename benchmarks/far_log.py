"""Time to open and read a log in a store with high latency.

    python benchmarks/far_log.py --files 10000 --delay 0.06

The store is a local folder in which opening a file takes `--delay` seconds, which stands for the
two round trips (size, bytes) per row group; bandwidth is not simulated. Opening is measured with
the file list of the manifest, and without it, where every footer is read. Reading is measured for
all row groups in order and for an epoch of training batches (read, checked, encoded), with one
thread and with read-ahead threads. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow import fs

from offtower.data import (
    BatchReader,
    Catalogue,
    EpochOrder,
    FeatureEncoding,
    ParquetLog,
    SimulatedWorld,
    WorldSettings,
    parquet,
    stores,
    write_log,
)
from offtower.data.loading import Loader
from offtower.data.location import Location
from offtower.data.log import finish_log
from offtower.data.parquet import Footer


class Delayed(fs.FileSystemHandler):
    """A folder in which opening a file takes `seconds`."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._inner = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
        self._seconds = seconds

    def open_input_file(self, path: str) -> Any:
        time.sleep(self._seconds)
        return self._inner.open_input_file(path)

    def open_input_stream(self, path: str) -> Any:
        time.sleep(self._seconds)
        return self._inner.open_input_stream(path)

    def get_file_info(self, paths: Any) -> Any:
        return self._inner.get_file_info(list(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return self._inner.get_file_info(selector)

    def get_type_name(self) -> str:
        return "delayed"

    def normalize_path(self, path: str) -> str:
        return path

    def _refused(self, *_: Any) -> Any:
        raise NotImplementedError("this store is read-only")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _refused
    delete_file = move = copy_file = open_output_stream = open_append_stream = _refused


def median(function: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def opening(folder: Path, files: int, repeats: int) -> dict[str, float]:
    """Return the seconds to open a log of many small files."""
    world = SimulatedWorld(100, WorldSettings(4, 4, 4))
    write_log(folder / "one", world.log(1000, seed=1), world.log_schema)
    for name in ("many", "unlisted"):
        (folder / name).mkdir()
        for number in range(files):
            copy = folder / name / f"part-{number:05d}.parquet"
            os.link(folder / "one" / "part-00000.parquet", copy)
    footer = Footer.of_written(folder / "one" / "part-00000.parquet")
    finish_log(Location.of(folder / "many"), world.log_schema, [footer] * files)
    return {
        f"{where}, {name}": median(lambda p=path: ParquetLog.open(p, world.log_schema), repeats)
        for where, root in (("here", str(folder)), ("far", "delayed://store"))
        for name, path in (("listed", f"{root}/many"), ("footers", f"{root}/unlisted"))
    }


def reading(folder: Path, rows: int, repeats: int) -> dict[str, float]:
    """Return rows per second of reading and of an epoch."""
    world = SimulatedWorld(1000, WorldSettings(16, 16, 16))
    write_log(folder / "log", world.log(rows, seed=1), world.log_schema, 16_384, 16 * 16_384)
    catalogue = Catalogue.from_table(world.catalogue_table(), world.catalogue_schema)
    here = ParquetLog.open(folder / "log")
    encoding = FeatureEncoding.fit(here.schema.context, here.tables())
    order = EpochOrder(here.row_group_sizes, 1024, seed=0, window_rows=131_072)

    def epoch(log: ParquetLog) -> None:
        with BatchReader(Loader(log, catalogue, encoding), order) as reader:
            assert sum(len(step.rows) for step in reader.epoch(0)) == rows

    found: dict[str, float] = {}
    threads = parquet.READ_THREADS
    for name, path, ahead in (
        ("here", str(folder / "log"), threads),
        ("far, one thread", "delayed://store/log", 1),
        (f"far, {threads} threads", "delayed://store/log", threads),
    ):
        parquet.READ_THREADS = ahead
        log = ParquetLog.open(path)
        found[f"{name}: read"] = rows / median(lambda f=log: list(map(len, f.tables())), repeats)
        found[f"{name}: epoch"] = rows / median(lambda f=log: epoch(f), repeats)
    parquet.READ_THREADS = threads
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--delay", type=float, default=0.06)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        handler = Delayed(folder, arguments.delay)
        stores.mount("delayed://store", fs.PyFileSystem(handler))
        opened = opening(folder, arguments.files, arguments.repeats)
        read = reading(folder, arguments.rows, arguments.repeats)
    if arguments.json:
        print(json.dumps({"seconds_to_open": opened, "rows_a_second": read}, indent=2))
        return
    for name, seconds in opened.items():
        print(f"open {arguments.files:,} files, {name:<16} {seconds:8.2f} s")
    for name, rate in read.items():
        print(f"{name:<24} {rate:12,.0f} rows/s")


if __name__ == "__main__":
    main()
