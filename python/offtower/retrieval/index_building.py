"""Build FAISS indices in chunks, or in shards where the lists exceed memory.

Inverted lists are k-means clusters by Euclidean distance, probed in the order of the query's inner
product with their centroids. Assigning items by inner product, FAISS's default, would concentrate
them in the lists of the longest centroids.

HNSW on inner products misses results at any search depth, because an inner product is no metric.
One more coordinate, sqrt(max |v|^2 - |v|^2), gives all items the same norm. For a query with a 0
there, the Euclidean nearest neighbors are the items of largest inner product (Bachrach et al.
2014). Candidates are rescored by their inner products.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.atomic import replace_file, write_text
from offtower.data.array_files import PART_ROWS
from offtower.errors import ConfigError, RunError
from offtower.mapping import Mapper
from offtower.retrieval.index import (
    FACTS,
    FILE,
    LISTS,
    AnnIndex,
    IndexOptions,
    import_faiss,
    metric_of,
    padded_dim,
    read_index,
)
from offtower.retrieval.index_tuning import tune
from offtower.retrieval.kmeans import Padded, fit_centroids, nearest, nearest_of
from offtower.retrieval.vector_source import VectorSource

_TRAINED = "trained.faiss"
_TRAIN_PER_LIST = 50


def build_index(
    source: VectorSource,
    queries: NDArray[np.float32],
    directory: Path,
    options: IndexOptions,
    version: str,
    mapper: Mapper | None = None,
) -> dict[str, Any]:
    """Build, tune and write an index.

    Args:
        source: (N, D) exported vectors; files where the mapper runs in other processes.
        queries: (n, D) queries of held-out contexts; parameters are tuned on the first half, and
            recall and latency are measured on the second.
        directory: folder for index.faiss and index.json (and index.ivfdata of merged shards).
        version: version of the export, checked when the index is opened.
        mapper: clusters and assigns parts of the items, and fills the shards of an index, with the
            same bytes for any number of workers.

    Returns:
        Kind, parameters, measured recall and latency, build time and bytes.

    Raises:
        MissingExtraError: FAISS is not installed.
        ConfigError: no parameters reach the target recall, or there are more lists than items.
        RunError: the index cannot be written.
    """
    faiss = import_faiss()
    mapper, vectors = mapper or Mapper(), source.open()
    directory.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    index, centroids = _trained(faiss, source, options, mapper)
    if options.shard_rows is not None and options.shard_rows < len(vectors):
        shards = _Shards(source, directory.resolve(), centroids)
        _build_shards(faiss, index, shards, options.shard_rows, mapper)
    elif options.kind == "hnsw":
        for part in _equal_norm(source):
            index.add(part)
    else:
        add_items(index, centroids, source, mapper)
    guard_write(lambda: faiss.write_index(index, str(directory / FILE)), directory)
    seconds = time.perf_counter() - began
    facts: dict[str, Any] = {
        "version": version,
        "kind": options.kind,
        "metric": "inner_product",
        "faiss": faiss.__version__,
        "count": len(vectors),
        "dim": int(vectors.shape[1]),
        "options": asdict(options),
        "build_seconds": seconds,
        "bytes": sum(
            (directory / f).stat().st_size for f in (FILE, LISTS) if (directory / f).exists()
        ),
    }
    opened = AnnIndex(read_index(faiss, directory), facts, vectors, source.scale)
    facts |= tune(opened, queries, vectors, source.scale, options)
    write_text(directory / FACTS, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return facts


def _trained(
    faiss: Any, source: VectorSource, options: IndexOptions, mapper: Mapper
) -> tuple[Any, NDArray[np.float32] | None]:
    """Return an empty trained index, and the centroids of its lists."""
    count, dim = source.open().shape
    ip = faiss.METRIC_INNER_PRODUCT
    if options.kind == "flat":
        return faiss.IndexFlatIP(dim), None
    if options.kind == "hnsw":
        width = padded_dim(options.kind, dim)
        index = faiss.IndexHNSWFlat(width, options.neighbors, metric_of(faiss, options.kind))
        index.hnsw.efConstruction = max(200, 4 * options.neighbors)
        return index, None
    lists = options.lists or max(1, min(round(4 * count**0.5), count // 39))
    if lists > count:
        raise ConfigError(f"lists={lists} exceeds the {count} items: set fewer lists")
    points = Padded(source, padded_dim(options.kind, dim))
    rows = min(count, max(_TRAIN_PER_LIST * lists, 65_536))
    picked = np.random.default_rng(options.seed).choice(count, rows, replace=False)
    clustered = np.sort(picked[: _TRAIN_PER_LIST * lists])
    parts = [clustered[first : first + PART_ROWS] for first in range(0, len(clustered), PART_ROWS)]
    centroids = fit_centroids(points, parts, lists, options.seed + 1, mapper)
    quantizer = faiss.IndexFlatIP(points.width)
    quantizer.add(centroids)
    if options.kind == "ivf_flat":
        index = faiss.IndexIVFFlat(quantizer, points.width, lists, ip)
    elif options.kind == "ivf_sq8":
        sq8 = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantizer, points.width, lists, sq8, ip)
    else:
        index = faiss.IndexIVFPQ(quantizer, points.width, lists, points.width // 2, 8, ip)
        index.pq.cp.niter = 10
        index.pq.cp.max_points_per_centroid = 64
    quantizer.this.disown()
    index.own_fields = True
    index.train(points(np.sort(picked)))
    return index, centroids


def add_items(
    index: Any, centroids: NDArray[np.float32] | None, source: VectorSource, mapper: Mapper
) -> None:
    """Add all items, part by part, to the lists of their nearest centroids."""
    parts = _parts(range(len(source.open())))
    if centroids is None:
        for rows in parts:
            index.add(source.float32(rows))
        return
    points = Padded(source, index.d)
    assigned = mapper.map(partial(nearest, points, centroids), parts, "assigning items to lists")
    for rows, lists in zip(parts, assigned, strict=True):
        _add(index, points(rows), lists, rows)


def _add(index: Any, part: NDArray[np.float32], lists: NDArray[np.int32], rows: range) -> None:
    """Add the items `rows` to lists."""
    faiss = import_faiss()
    chosen, ids = lists.astype(np.int64), np.arange(rows.start, rows.stop, dtype=np.int64)
    part = np.ascontiguousarray(part)
    pointer = faiss.swig_ptr
    index.add_core(len(part), pointer(part), pointer(ids), pointer(chosen))


def _parts(rows: range) -> list[range]:
    starts = range(rows.start, rows.stop, PART_ROWS)
    return [range(first, min(first + PART_ROWS, rows.stop)) for first in starts]


def _equal_norm(source: VectorSource) -> Iterator[NDArray[np.float32]]:
    """Chunks of the items, with the coordinate that gives all the largest norm."""

    def squared(part: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.asarray(np.einsum("nd,nd->n", part, part, dtype=np.float64))

    ranges = _parts(range(len(source.open())))
    lengths = [squared(source.float32(rows)) for rows in ranges]
    longest = max(float(part.max(initial=0.0)) for part in lengths)
    for rows, length in zip(ranges, lengths, strict=True):
        missing = np.sqrt(np.maximum(longest - length, 0.0)).astype(np.float32)
        yield np.ascontiguousarray(np.column_stack([source.float32(rows), missing]))


@dataclass(frozen=True)
class _Shards:
    """What the shards of an index are filled from, and where."""

    source: VectorSource
    directory: Path
    centroids: NDArray[np.float32] | None


def _build_shards(
    faiss: Any, trained: Any, shards: _Shards, shard_rows: int, mapper: Mapper
) -> None:
    """Fill copies of the trained index shard by shard, and merge their lists on disk.

    Raises:
        RunError: the disk has no space for the merged lists. FAISS maps that file sparsely, and
            writing to it on a full disk would kill the process (SIGBUS).
    """
    from faiss.contrib.ondisk import merge_ondisk

    directory, rows = shards.directory, len(shards.source.open())
    guard_write(lambda: faiss.write_index(trained, str(directory / _TRAINED)), directory)
    parts = [
        (f"shard-{number:05d}.faiss", range(start, min(start + shard_rows, rows)))
        for number, start in enumerate(range(0, rows, shard_rows))
    ]
    for _ in mapper.map(partial(_fill_shard, shards), parts, "filling the index"):
        pass
    needed, free = rows * (trained.code_size + 8), shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"the disk of '{directory}' is full: the index needs {needed:,} bytes, {free:,} are "
            "free. Free some space and export again; the previous export is unchanged"
        )
    names = [str(directory / name) for name, _ in parts]
    guard_write(lambda: merge_ondisk(trained, names, str(directory / LISTS)), directory)
    for name in (*names, _TRAINED):
        (directory / name).unlink()


def _fill_shard(shards: _Shards, part: tuple[str, range]) -> None:
    """Write the shard of some items (idempotent)."""
    faiss = import_faiss()
    name, whole = part
    directory = shards.directory
    shard = faiss.read_index(str(directory / _TRAINED))
    points = Padded(shards.source, shard.d)
    for rows in _parts(whole):
        some = points(rows)
        if shards.centroids is None:
            shard.add(some)
        else:
            _add(shard, some, nearest_of(some, shards.centroids), rows)
    with replace_file(directory / name) as path:
        guard_write(lambda: faiss.write_index(shard, str(path)), directory)


def guard_write(write: Callable[[], Any], directory: Path) -> None:
    """Raise FAISS's write errors as RunError with the folder's name."""
    try:
        write()
    except RuntimeError as error:
        raise RunError(
            f"the index could not be written to '{directory}' (is the disk full?): "
            f"{str(error).strip().splitlines()[-1]}"
        ) from error
