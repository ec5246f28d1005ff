"""Item vectors of a policy, written to disk in chunks.

If the policy has an item bias, it is the last coordinate of the item vector, and that of the query
is 1. The temperature is folded into the query. So the inner product of query and item vector is the
policy's logit, and item vectors do not depend on the temperature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from offtower.data.array_files import (
    WrittenFile,
    array_writer,
    map_array,
    part_names,
    part_rows,
    write_array,
)
from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_array, category_values, hash_values, is_text
from offtower.data.encoding import to_tensors
from offtower.data.parquet_checksums import UNREADABLE
from offtower.errors import DataError, RunError
from offtower.execution import LOCAL, Execution
from offtower.mapping import Mapper
from offtower.models.policy import TwoTowerPolicy
from offtower.progress import report_rows
from offtower.retrieval.catalogue_stream import CHUNK, CatalogueStream

Dtype = Literal["float32", "float16", "int8"]

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
    files: dict[str, WrittenFile]
    """Of the vectors, by name, in the order of the items."""


@dataclass(frozen=True)
class _Part:
    """A part of the items, whose vectors are written."""

    first: int
    ids: list[pa.Array]
    file: str
    written: WrittenFile

    @property
    def rows(self) -> int:
        return sum(len(ids) for ids in self.ids)


def write_vectors(
    policy: TwoTowerPolicy,
    catalogue: CatalogueStream,
    directory: Path,
    *,
    chunk: int = CHUNK,
    execution: Execution = LOCAL,
) -> WrittenVectors:
    """Embed every item and write (N, D) float32 vectors and ids.arrow.

    Memory is O(chunk) plus 8 bytes per item for finding duplicate ids, and the ids of a part.

    Args:
        execution: embeds the items. Each part of the vectors is a file of its own, which appears
            in the directory when it is whole; the workers must see the directory.

    Raises:
        DataError: an id is null or duplicate, a feature is invalid, or an embedding is not finite.
    """
    progress = execution.progress
    policy.eval()
    n = catalogue.num_items
    keys = np.empty(n, dtype=np.uint64)
    text, kind = False, pa.int64()
    files: dict[str, WrittenFile] = {}
    writer: pa.RecordBatchFileWriter | None = None
    embed = partial(_embed_items, policy, catalogue, directory.resolve(), chunk)
    parts = list(zip(part_names("vectors", n), part_rows(n), strict=True))
    progress.start("embedding items", n)
    sink = pa.OSFile(str(directory / "ids.arrow"), "wb")
    try:
        for part in report_rows(execution.mapper.map(embed, parts, "embedding items"), progress):
            files[part.file] = part.written
            first = part.first
            for ids in part.ids:
                text = is_text(ids.type)
                keys[first : first + len(ids)] = id_keys(ids)
                first += len(ids)
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
    return WrittenVectors(n, text, catalogue.fingerprint, digest, files)


def _embed_items(
    policy: TwoTowerPolicy,
    catalogue: CatalogueStream,
    directory: Path,
    chunk: int,
    part: tuple[str, range],
) -> _Part:
    """Embed the items of a part and write its file (idempotent)."""
    name, items = part
    written, ids = WrittenFile(), []
    shape = (len(items), query_dim(policy))
    with array_writer(directory / name, np.float32, shape, written) as append:
        for some in catalogue.chunks(chunk, items):
            append(embed_part(policy, some))
            ids.append(as_array(some.item_ids))
    return _Part(items.start, ids, name, written)


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


def query_dim(policy: TwoTowerPolicy) -> int:
    """D: the embedding dimension, plus one if items have a bias."""
    return policy.config.embedding_dim + int(policy.config.item_bias)


def quantize(
    files: Sequence[Path], dtype: Dtype, directory: Path, name: str, mapper: Mapper
) -> tuple[dict[str, WrittenFile], NDArray[np.float32] | None]:
    """Write vectors in lower precision.

    int8 has one scale per coordinate: v = scale * q, so <u, v> = <u * scale, q>.

    Args:
        files: of the parts of the (n, D) vectors.
        name: of the new files, without a suffix.
        mapper: reads and writes the parts, with the same bits for any number of workers.

    Returns:
        What was written, by file name; and the (D,) scale of int8, None for float16.

    Raises:
        DataError: a value overflows float16.
    """
    files = [file.resolve() for file in files]
    n, dim = map_array(files).shape
    scale: NDArray[np.float32] | None = None
    found = mapper.map(partial(_largest, files), part_rows(n), "measuring vectors")
    largest = np.max(list(found), axis=0, initial=0.0)
    if dtype == "int8":
        scale = np.where(largest > 0.0, largest / 127.0, 1.0).astype(np.float32)
    elif dtype == "float16" and float(largest.max(initial=0.0)) > 65_504.0:
        raise DataError(
            f"an item vector holds {float(largest.max()):.3g}, which overflows float16; export "
            "with dtype float32 or int8"
        )
    block = partial(_rounded, files, scale)
    return write_array(directory, name, np.dtype(dtype), (n, dim), block, mapper), scale


def _largest(files: Sequence[Path], rows: range) -> NDArray[np.float32]:
    """(D,) largest absolute values of some rows."""
    vectors = map_array(files)
    found: NDArray[np.float32] = np.zeros(vectors.shape[1], dtype=np.float32)
    for first in range(rows.start, rows.stop, CHUNK):
        part = np.abs(vectors[first : min(first + CHUNK, rows.stop)])
        found = np.maximum(found, part.max(axis=0, initial=0.0))
    return found


def _rounded(
    files: Sequence[Path], scale: NDArray[np.float32] | None, rows: range
) -> NDArray[np.float32]:
    part: NDArray[np.float32] = map_array(files)[rows.start : rows.stop]
    return part if scale is None else np.rint(part / scale)


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


def load_vectors(paths: Sequence[Path], count: int, dim: int, dtype: str) -> NDArray[Any]:
    """Open item vectors from the files of their parts, memory-mapped and read-only.

    Raises:
        RunError: a file is damaged, or shape or dtype differ from the manifest's.
    """
    try:
        vectors = map_array(paths)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"'{paths[0]}' cannot be read: {error}; export again") from error
    if vectors.shape != (count, dim) or vectors.dtype != np.dtype(dtype):
        raise RunError(
            f"'{paths[0]}' holds {vectors.shape} {vectors.dtype}, the manifest says "
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
