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
from offtower.data.array_files import map_array
from offtower.errors import RunError
from offtower.mapping import Mapper
from offtower.retrieval.index import (
    FACTS,
    FILE,
    LISTS,
    AnnIndex,
    IndexOptions,
    import_faiss,
    metric_of,
    pad,
    padded_dim,
    read_index,
)
from offtower.retrieval.index_tuning import tune

_CHUNK = 262_144
_TRAINED, _CENTROIDS = "trained.faiss", "centroids.faiss"
_TRAIN_PER_LIST = 50


@dataclass(frozen=True)
class StoredVectors:
    """Exported vectors in files.

    Attributes:
        files: of their parts, in order; seen by the mapper's workers.
        mapper: fills the shards of an index, with the same bytes for any number of workers.
    """

    files: tuple[Path, ...]
    mapper: Mapper

    def open(self) -> NDArray[Any]:
        return map_array(self.files)


def build_index(
    vectors: NDArray[Any] | StoredVectors,
    queries: NDArray[np.float32],
    directory: Path,
    options: IndexOptions,
    version: str,
    scale: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Build, tune and write an index.

    Args:
        vectors: (N, D) exported vectors, or the files with them, of which a mapper fills shards.
        queries: (n, D) queries of held-out contexts; parameters are tuned on the first half, and
            recall and latency are measured on the second.
        directory: folder for index.faiss and index.json (and index.ivfdata of merged shards).
        version: version of the export, checked when the index is opened.

    Returns:
        Kind, parameters, measured recall and latency, build time and bytes.

    Raises:
        MissingExtraError: FAISS is not installed.
        ConfigError: no parameters reach the target recall.
        RunError: the index cannot be written.
    """
    faiss = import_faiss()
    stored = vectors if isinstance(vectors, StoredVectors) else None
    vectors = vectors.open() if isinstance(vectors, StoredVectors) else vectors
    directory.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    index, centroids = _trained(faiss, vectors, scale, options)
    if options.shard_rows is not None and options.shard_rows < len(vectors):
        shards = _ShardSource(
            vectors if stored is None else stored.files, scale, directory.resolve()
        )
        mapper = Mapper() if stored is None else stored.mapper
        _build_shards(faiss, index, centroids, shards, options.shard_rows, mapper)
    elif options.kind == "hnsw":
        for part in _equal_norm(vectors, scale):
            index.add(part)
    else:
        add_items(faiss, index, centroids, vectors, scale)
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
    opened = AnnIndex(read_index(faiss, directory), facts, vectors, scale)
    facts |= tune(opened, queries, vectors, scale, options)
    write_text(directory / FACTS, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return facts


def _trained(
    faiss: Any, vectors: NDArray[Any], scale: NDArray[np.float32] | None, options: IndexOptions
) -> tuple[Any, Any]:
    """Return an empty trained index, and the centroids of its lists as a Euclidean index."""
    count, dim = vectors.shape
    ip = faiss.METRIC_INNER_PRODUCT
    if options.kind == "flat":
        return faiss.IndexFlatIP(dim), None
    if options.kind == "hnsw":
        width = padded_dim(options.kind, dim)
        index = faiss.IndexHNSWFlat(width, options.neighbors, metric_of(faiss, options.kind))
        index.hnsw.efConstruction = max(200, 4 * options.neighbors)
        return index, None
    lists = options.lists or max(1, min(round(4 * count**0.5), count // 39))
    width = padded_dim(options.kind, dim)
    rows = min(count, max(_TRAIN_PER_LIST * lists, 65_536))
    picked = np.sort(np.random.default_rng(options.seed).choice(count, rows, replace=False))
    sample = pad(_float32(vectors[picked], scale), width)
    means = faiss.Kmeans(
        width,
        lists,
        niter=10,
        seed=options.seed + 1,
        min_points_per_centroid=1,
        max_points_per_centroid=_TRAIN_PER_LIST,
    )
    means.train(sample)
    quantizer = faiss.IndexFlatIP(width)
    quantizer.add(means.centroids)
    if options.kind == "ivf_flat":
        index = faiss.IndexIVFFlat(quantizer, width, lists, ip)
    elif options.kind == "ivf_sq8":
        sq8 = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantizer, width, lists, sq8, ip)
    else:
        index = faiss.IndexIVFPQ(quantizer, width, lists, width // 2, 8, ip)
        index.pq.cp.niter = 10
        index.pq.cp.max_points_per_centroid = 64
    quantizer.this.disown()
    index.own_fields = True
    index.train(sample)
    return index, means.index


def add_items(
    faiss: Any,
    index: Any,
    centroids: Any,
    vectors: NDArray[Any],
    scale: NDArray[np.float32] | None,
) -> None:
    """Add all items, in chunks, to the lists of their nearest centroids."""
    for part, first in _parts(vectors, scale, 0, len(vectors)):
        _add(faiss, index, centroids, part, first)


def _add(faiss: Any, index: Any, centroids: Any, part: NDArray[np.float32], first: int) -> None:
    """Add items first, first + 1, ... to the lists of their nearest centroids."""
    if centroids is None:
        index.add(part)
        return
    part = np.ascontiguousarray(pad(part, index.d))
    lists = np.ascontiguousarray(centroids.search(part, 1)[1].reshape(-1), dtype=np.int64)
    ids = np.arange(first, first + len(part), dtype=np.int64)
    pointer = faiss.swig_ptr
    index.add_core(len(part), pointer(part), pointer(ids), pointer(lists))


def _parts(
    vectors: NDArray[Any], scale: NDArray[np.float32] | None, start: int, stop: int
) -> Iterator[tuple[NDArray[np.float32], int]]:
    for first in range(start, stop, _CHUNK):
        yield _float32(vectors[first : min(first + _CHUNK, stop)], scale), first


def _float32(part: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    wide = np.ascontiguousarray(part, dtype=np.float32)
    return wide if scale is None else wide * scale


def _equal_norm(
    vectors: NDArray[Any], scale: NDArray[np.float32] | None
) -> Iterator[NDArray[np.float32]]:
    """Chunks of the items, with the coordinate that gives all the largest norm."""

    def squared(part: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.asarray(np.einsum("nd,nd->n", part, part, dtype=np.float64))

    parts = [squared(part) for part, _ in _parts(vectors, scale, 0, len(vectors))]
    longest = max(float(part.max(initial=0.0)) for part in parts)
    for (part, _), length in zip(_parts(vectors, scale, 0, len(vectors)), parts, strict=True):
        missing = np.sqrt(np.maximum(longest - length, 0.0)).astype(np.float32)
        yield np.ascontiguousarray(np.column_stack([part, missing]))


@dataclass(frozen=True)
class _ShardSource:
    """What the shards of an index are filled from.

    Attributes:
        vectors: an array in this process, or files that other processes open too.
    """

    vectors: NDArray[Any] | tuple[Path, ...]
    scale: NDArray[np.float32] | None
    directory: Path

    def open(self) -> NDArray[Any]:
        return map_array(self.vectors) if isinstance(self.vectors, tuple) else self.vectors


def _build_shards(
    faiss: Any, trained: Any, centroids: Any, source: _ShardSource, shard_rows: int, mapper: Mapper
) -> None:
    """Fill copies of the trained index shard by shard, and merge their lists on disk.

    Raises:
        RunError: the disk has no space for the merged lists. FAISS maps that file sparsely, and
            writing to it on a full disk would kill the process (SIGBUS).
    """
    from faiss.contrib.ondisk import merge_ondisk

    directory, rows = source.directory, len(source.open())
    for index, name in ((trained, _TRAINED), (centroids, _CENTROIDS)):
        guard_write(lambda i=index, n=name: faiss.write_index(i, str(directory / n)), directory)  # type: ignore[misc]
    parts = [
        (f"shard-{number:05d}.faiss", range(start, min(start + shard_rows, rows)))
        for number, start in enumerate(range(0, rows, shard_rows))
    ]
    for _ in mapper.map(partial(_fill_shard, source), parts, "filling the index"):
        pass
    needed, free = rows * (trained.code_size + 8), shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"the disk of '{directory}' is full: the index needs {needed:,} bytes, {free:,} are "
            "free. Free some space and export again; the previous export is unchanged"
        )
    names = [str(directory / name) for name, _ in parts]
    guard_write(lambda: merge_ondisk(trained, names, str(directory / LISTS)), directory)
    for name in (*names, _TRAINED, _CENTROIDS):
        (directory / name).unlink()


def _fill_shard(source: _ShardSource, part: tuple[str, range]) -> None:
    """Write the shard of some items (idempotent)."""
    faiss = import_faiss()
    name, rows = part
    directory, vectors = source.directory, source.open()
    shard, centroids = (faiss.read_index(str(directory / file)) for file in (_TRAINED, _CENTROIDS))
    for items, first in _parts(vectors, source.scale, rows.start, rows.stop):
        _add(faiss, shard, centroids, items, first)
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
