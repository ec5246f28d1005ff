"""Item vectors of a policy, written to disk in chunks.

If the policy has an item bias, it is the last coordinate of the item vector, and that of the query
is 1. The temperature is folded into the query. So the inner product of query and item vector is the
policy's logit, and item vectors do not depend on the temperature.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_array, category_values, hash_values, is_text
from offtower.data.encoding import to_tensors
from offtower.data.parquet_checksums import UNREADABLE
from offtower.errors import DataError, RunError
from offtower.execution import LOCAL, Execution
from offtower.mapping import Mapper, pieces
from offtower.models.policy import TwoTowerPolicy
from offtower.progress import report_rows
from offtower.retrieval.catalogue_stream import CHUNK, CatalogueStream

Dtype = Literal["float32", "float16", "int8"]

_PART_CHUNKS = 16
"""Chunks per task of a worker."""
_TOWER_ROWS = 8_192
"""Items per forward pass; larger buffers are allocated anew by the system each time."""


@dataclass(frozen=True)
class WrittenVectors:
    """Description of what `write_vectors` wrote."""

    count: int
    text_ids: bool
    fingerprint: str | None
    """Of the catalogue, if offtower wrote it."""
    ids_sha256: str


@dataclass(frozen=True)
class _Embedded:
    """Ids of an embedded chunk, whose vectors are in the file already."""

    first: int
    ids: pa.Array

    @property
    def rows(self) -> int:
        return len(self.ids)


def write_vectors(
    policy: TwoTowerPolicy,
    catalogue: CatalogueStream,
    directory: Path,
    *,
    chunk: int = CHUNK,
    execution: Execution = LOCAL,
) -> WrittenVectors:
    """Embed every item and write vectors.npy (N, D) float32 and ids.arrow.

    Memory is O(chunk) plus 8 bytes per item for finding duplicate ids.

    Args:
        execution: embeds the items. Workers write to the same file, so they must share the
            directory.

    Raises:
        DataError: an id is null or duplicate, a feature is invalid, or an embedding is not finite.
    """
    mapper, progress = execution.mapper, execution.progress
    policy.eval()
    n = catalogue.num_items
    path = (directory / "vectors.npy").resolve()
    create_array(path, np.float32, (n, query_dim(policy)))
    keys = np.empty(n, dtype=np.uint64)
    text, kind = False, pa.int64()
    writer: pa.RecordBatchFileWriter | None = None
    embed = partial(_embed_items, policy, catalogue, path, chunk)
    progress.start("embedding items", n)
    sink = pa.OSFile(str(directory / "ids.arrow"), "wb")
    try:
        for part in report_rows(_embedded(embed, catalogue, chunk, mapper), progress):
            ids, text = part.ids, is_text(part.ids.type)
            keys[part.first : part.first + part.rows] = id_keys(ids)
            if writer is None:
                unsigned = pa.types.is_uint64(ids.type)
                kind = pa.large_string() if text else pa.uint64() if unsigned else pa.int64()
                writer = pa.ipc.new_file(sink, pa.schema([("item_id", kind)]))
            elif text != pa.types.is_large_string(kind):
                raise DataError(
                    "item ids are text in one file of the catalogue, numbers in another"
                )
            # As they are: `category_values` has large unsigned integers as negative ones.
            column = pc.cast(ids if kind == pa.uint64() else category_values(ids), kind)
            writer.write_batch(pa.record_batch([column], names=["item_id"]))
    finally:
        if writer is not None:
            writer.close()
        sink.close()
        progress.finish()
    digest = hashlib.sha256(keys.data).hexdigest()
    _check_unique(keys, directory)
    return WrittenVectors(n, text, catalogue.fingerprint, digest)


def _embedded(
    embed: Callable[[range], Iterator[_Embedded]],
    catalogue: CatalogueStream,
    chunk: int,
    mapper: Mapper,
) -> Iterator[_Embedded]:
    """Embed every chunk, in this process or by the mapper's workers; yield them in order.

    In one process the catalogue is read as one range: each range that begins inside a row group
    reads that group again.
    """
    if not mapper.distributed:
        yield from embed(range(catalogue.num_items))
        return
    starts = [*catalogue.starts(chunk), catalogue.num_items]
    parts = pieces(len(starts) - 1, _PART_CHUNKS, mapper.workers)
    items = [range(starts[part.start], starts[part.stop]) for part in parts]
    for found in mapper.map(partial(_all, embed), items, "embedding items"):
        yield from found


def _all(embed: Callable[[range], Iterator[_Embedded]], items: range) -> list[_Embedded]:
    return list(embed(items))


def _embed_items(
    policy: TwoTowerPolicy, catalogue: CatalogueStream, path: Path, chunk: int, items: range
) -> Iterator[_Embedded]:
    """Embed some items into their rows of the file (idempotent)."""
    vectors: Any = np.load(path, mmap_mode="r+")
    first = items.start
    for part in catalogue.chunks(chunk, items):
        vectors[first : first + part.num_items] = embed_part(policy, part)
        yield _Embedded(first, as_array(part.item_ids))
        first += part.num_items
    vectors.flush()


@torch.no_grad()
def embed_part(policy: TwoTowerPolicy, part: Catalogue) -> NDArray[np.float32]:
    """Embed the items of a chunk as (n, D) vectors.

    Raises:
        DataError: a vector is not finite; the message names the item.
    """
    out = np.empty((part.num_items, query_dim(policy)), dtype=np.float32)
    for first in range(0, part.num_items, _TOWER_ROWS):
        last = min(first + _TOWER_ROWS, part.num_items)
        features = to_tensors(policy.item_encoding.encode(part.table(first, last)))
        embedding, bias = policy.item_tower(features)
        out[first:last, : embedding.shape[1]] = embedding.numpy()
        if bias is not None:
            out[first:last, -1] = bias.numpy()
    bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
    if bad.size:
        raise DataError(
            f"the embedding of item {part.item_ids[int(bad[0])].as_py()!r} is not finite"
            + (f" (and of {bad.size - 1} more in its chunk)" if bad.size > 1 else "")
            + ": the policy's weights or the item's features hold NaN or overflow; see "
            "metrics.jsonl and train again"
        )
    return out


def create_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Create a .npy file mapped for writing, with its disk space reserved.

    Raises:
        OSError: the disk is full. Without the reservation, writing to the map of a sparse file
            would kill the process (SIGBUS).
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
    return array


def query_dim(policy: TwoTowerPolicy) -> int:
    """D: the embedding dimension, plus one if items have a bias."""
    return policy.config.embedding_dim + int(policy.config.item_bias)


def quantize(
    vectors: NDArray[np.float32], dtype: Dtype, directory: Path, name: str, chunk: int = CHUNK
) -> NDArray[np.float32] | None:
    """Write vectors in lower precision.

    int8 has one scale per coordinate: v = scale * q, so <u, v> = <u * scale, q>.

    Returns:
        The (D,) scale of int8; None for float16.

    Raises:
        DataError: a value overflows float16.
    """
    n, dim = vectors.shape
    scale: NDArray[np.float32] | None = None
    largest = np.zeros(dim, dtype=np.float32)
    for first in range(0, n, chunk):
        part = np.abs(vectors[first : first + chunk])
        largest = np.maximum(largest, part.max(axis=0, initial=0.0))
    if dtype == "int8":
        scale = np.where(largest > 0.0, largest / 127.0, 1.0).astype(np.float32)
    elif dtype == "float16" and float(largest.max(initial=0.0)) > 65_504.0:
        raise DataError(
            f"an item vector holds {float(largest.max()):.3g}, which overflows float16; export "
            "with dtype float32 or int8"
        )
    target = create_array(directory / name, np.dtype(dtype), (n, dim))
    for first in range(0, n, chunk):
        part = vectors[first : first + chunk]
        if scale is not None:
            part = np.rint(part / scale)
        target[first : first + chunk] = part.astype(np.dtype(dtype))
    target.flush()
    return scale


def load_ids(path: Path, count: int) -> pa.ChunkedArray:
    """Open item ids, memory-mapped.

    Raises:
        RunError: the file is damaged or has another number of ids.
    """
    try:
        # The file stays mapped for as long as the columns live.
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except UNREADABLE as error:
        raise RunError(f"'{path}' cannot be read: {error}; export again") from error
    if table.num_rows != count:
        raise RunError(f"'{path}' holds {table.num_rows:,} ids, expected {count:,}; export again")
    return table.column("item_id")


def load_vectors(path: Path, count: int, dim: int, dtype: str) -> NDArray[Any]:
    """Open item vectors, memory-mapped and read-only.

    Raises:
        RunError: the file is damaged, or shape or dtype differ from the manifest's.
    """
    try:
        vectors: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"'{path}' cannot be read: {error}; export again") from error
    if vectors.shape != (count, dim) or vectors.dtype != np.dtype(dtype):
        raise RunError(
            f"'{path}' holds {vectors.shape} {vectors.dtype}, the manifest says "
            f"{(count, dim)} {dtype}; export again"
        )
    return vectors


def load_scale(path: Path, dim: int) -> NDArray[np.float32]:
    """Load the (dim,) scale of int8 vectors.

    Raises:
        RunError: the file is damaged or has another shape.
    """
    try:
        scale: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"'{path}' cannot be read: {error}; export again") from error
    if scale.shape != (dim,):
        raise RunError(f"'{path}' has shape {scale.shape}, expected {(dim,)}; export again")
    return scale


def id_keys(ids: pa.Array | pa.ChunkedArray) -> NDArray[np.uint64]:
    """64-bit keys of ids: integers as they are, text hashed."""
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks)
    if is_text(ids.type):
        return hash_values(ids)
    values: NDArray[Any] = category_values(ids).to_numpy(zero_copy_only=False)
    return values.astype(np.int64).view(np.uint64)


def _check_unique(keys: NDArray[np.uint64], directory: Path) -> None:
    """Raise DataError for a duplicate id. Sorts `keys` in place."""
    keys.sort()
    found = np.flatnonzero(keys[1:] == keys[:-1])
    if not found.size:
        return
    ids = load_ids(directory / "ids.arrow", len(keys))
    rows = np.flatnonzero(id_keys(ids.combine_chunks()) == keys[found[0]])
    first, second = int(rows[0]), int(rows[1])
    raise DataError(
        f"item id {ids[first].as_py()!r} stands twice in the catalogue, as items {first} and "
        f"{second}"
        + (f"; {found.size} ids in all do" if found.size > 1 else "")
        + ". Each item needs an id of its own"
    )
