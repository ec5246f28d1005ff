"""CPU time of reading a log with column-chunk checksums, page checksums, and without verification.

python benchmarks/read_checksums.py --json read_checksums.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from offtower.data.parquet_checksums import Checksums

GROUPS, ROWS = 8, 65_536


def table(rng: np.random.Generator) -> pa.Table:
    """Return a row group of a log with every kind of feature."""
    vectors = pa.array(rng.normal(size=16 * ROWS).astype(np.float32))
    return pa.table(
        {
            "action": rng.integers(0, 100_000, ROWS),
            "reward": rng.integers(0, 2, ROWS).astype(float),
            "pscore": rng.random(ROWS),
            "age": rng.normal(size=ROWS),
            "country": pa.array([f"c{number}" for number in rng.integers(0, 50, ROWS)]),
            "user": rng.integers(0, 2**40, ROWS),
            "time": np.arange(ROWS) + 10**15,
            "vector": pa.FixedSizeListArray.from_arrays(vectors, 16),
            "tags": pa.array([[int(number)] for number in rng.integers(0, 100, ROWS)]),
        }
    )


def measure(file: Path, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tables = [table(rng) for _ in range(GROUPS)]
    columns = tables[0].column_names
    began = time.process_time()
    with pq.ParquetWriter(
        file, tables[0].schema, compression="zstd", write_page_checksum=True
    ) as writer:
        for one in tables:
            writer.write_table(one, row_group_size=ROWS)
    written = time.process_time()
    checksums = Checksums.of(file)
    computed = time.process_time()

    def plain(*, pages: bool) -> None:
        for group in range(GROUPS):
            with pq.ParquetFile(file, page_checksum_verification=pages) as opened:
                opened.read_row_group(group, columns=columns)

    def chunks() -> None:
        for group in range(GROUPS):
            with pa.OSFile(str(file)) as source:
                metadata = checksums.read_footer(source)
                checksums.read_row_group(source, metadata, group, columns)

    ways: dict[str, Callable[[], None]] = {
        "none": lambda: plain(pages=False),
        "pages": lambda: plain(pages=True),
        "chunks": chunks,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    ratios = [
        chunk / plain for chunk, plain in zip(seconds["chunks"], seconds["none"], strict=True)
    ]
    return {
        "megabytes": file.stat().st_size / 1e6,
        "write_seconds": written - began,
        "checksum_seconds": computed - written,
        "read_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "chunks_to_none": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder) / "log.parquet", arguments.repeats)
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
