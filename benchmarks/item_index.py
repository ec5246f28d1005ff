"""Memory and speed of the index from item ids to numbers, held by each worker or shared.

    python benchmarks/item_index.py --items 1000000 10000000 --json item_index.json

Workers are processes that open a catalogue of 20-byte ids and look up 200 batches of 8,192 random
ones, of which one in ten is unknown. Then one process passes over a catalogue with vectors, as the
serial steps of a run do. Anonymous memory is of each process; Pss counts a mapped page
by the share of the processes that map it. Lookups are per processor second.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.multiprocessing as mp

from offtower.config import PolicyConfig
from offtower.data import (
    Catalogue,
    CatalogueSchema,
    FeatureEncoding,
    FeatureSpec,
    catalogue_index,
    node_cache,
)
from offtower.models import ItemFeatures
from offtower.models.policy import TwoTowerPolicy

T = TypeVar("T")

BATCH, BATCHES = 8_192, 200
_WRITE_ROWS = 1 << 20


def ids_of(numbers: np.ndarray) -> pa.Array:
    """20-byte ids "i-" and 18 digits, which are a permutation of the numbers."""
    scattered = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) % np.uint64(10**18)
    text = np.empty((len(numbers), 20), dtype=np.uint8)
    text[:, 0], text[:, 1] = ord("i"), ord("-")
    for digit in range(18):
        text[:, 19 - digit] = 48 + (scattered % np.uint64(10)).astype(np.uint8)
        scattered //= np.uint64(10)
    offsets = pa.py_buffer(np.arange(0, text.size + 1, 20, dtype=np.int32))
    return pa.Array.from_buffers(pa.string(), len(text), [None, offsets, pa.py_buffer(text)])


def write(path: Path, items: int) -> None:
    with pq.ParquetWriter(path, pa.schema([("item_id", pa.string())])) as writer:
        for start in range(0, items, _WRITE_ROWS):
            some = ids_of(np.arange(start, min(start + _WRITE_ROWS, items)))
            writer.write_table(pa.table({"item_id": some}))


def memory(name: str) -> float:
    """MiB of an entry of /proc/self/smaps_rollup or /proc/self/status."""
    for file in ("smaps_rollup", "status"):
        for line in Path(f"/proc/self/{file}").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 2**10
    raise KeyError(name)


def worker(rank: int, path: Path, items: int, shared: bool, barrier: Any, found: Any) -> None:
    setattr(catalogue_index, "SHARE_ABOVE", 0 if shared else 2**60)  # noqa: B010
    before = memory("RssAnon")
    began = time.process_time(), time.perf_counter()
    catalogue = Catalogue.open(path, CatalogueSchema())
    opened = time.process_time() - began[0], time.perf_counter() - began[1]
    rng = np.random.default_rng(rank)
    used = 0.0
    for _ in range(BATCHES):
        number = rng.integers(0, items, BATCH)
        unknown = rng.random(BATCH) < 0.1
        asked = ids_of(np.where(unknown, number + 2 * items, number))
        start = time.process_time()
        index = catalogue.index_of(asked)
        used += time.process_time() - start
        assert np.array_equal(index, np.where(unknown, -1, number))
    barrier.wait()
    found.put(
        {
            "anonymous_mib": memory("RssAnon") - before,
            "pss_mib": memory("Pss"),
            "processor_seconds_to_open": opened[0],
            "lookups_per_second": BATCH * BATCHES / used,
        }
    )
    barrier.wait()


def passes(folder: Path, items: int, dim: int) -> dict[str, float]:
    """Processor seconds of one thread per million items, of each pass over a catalogue."""
    torch.set_num_threads(1)
    setattr(catalogue_index, "SHARE_ABOVE", 0)  # noqa: B010
    rng = np.random.default_rng(0)
    flat = pa.array(rng.standard_normal(items * dim, dtype=np.float32))
    vectors = pa.FixedSizeListArray.from_arrays(flat, dim)
    table = pa.table({"item_id": ids_of(np.arange(items)), "v": vectors})
    pq.write_table(table, folder / "vectors.parquet", row_group_size=65_536)
    specs = (FeatureSpec(name="v", kind="vector", dim=dim),)
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        began = time.process_time()
        result = work()
        found[name] = (time.process_time() - began) / items * 1e6
        return result

    opened = timed(
        "check, fingerprint and index",
        lambda: Catalogue.open(folder / "vectors.parquet", CatalogueSchema(features=specs)),
    )
    blocks = [range(at, min(at + 65_536, items)) for at in range(0, items, 65_536)]
    encoding = timed(
        "fit of encodings",
        lambda: FeatureEncoding.fit(specs, (opened.table(b.start, b.stop) for b in blocks)),
    )
    features = timed(
        "encoded features", lambda: ItemFeatures.from_catalogue(opened, encoding, share_above=0)
    )
    context = FeatureEncoding.fit(specs, [opened.table(0, 1000)])
    policy = TwoTowerPolicy(PolicyConfig(embedding_dim=dim), context, encoding)
    with torch.no_grad():
        timed("embedding", lambda: policy.embed_items(features))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pass-items", type=int, default=300_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        os.environ[node_cache.FOLDER] = str(Path(name) / "cache")
        for items in arguments.items:
            path = Path(name) / f"{items}.parquet"
            write(path, items)
            for shared in (False, True):
                context = mp.get_context("spawn")
                barrier, found = context.Barrier(arguments.workers), context.Queue()
                mp.start_processes(worker, (path, items, shared, barrier, found), arguments.workers)
                for line in (found.get() for _ in range(arguments.workers)):
                    line = {"items": items, "shared": shared, **line}
                    print({k: round(v, 1) if isinstance(v, float) else v for k, v in line.items()})
                    results.append(line)
        seconds = passes(Path(name), arguments.pass_items, 64)
        print({key: round(value, 2) for key, value in seconds.items()})
        results.append({"items": arguments.pass_items, "processor_seconds_per_million": seconds})
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
