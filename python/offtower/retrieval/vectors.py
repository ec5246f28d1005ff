"""Item vectors of a policy, streamed to disk: a hundred million items in bounded memory.

The last coordinate of an item vector is the item's bias where the policy has one; the context's is
then 1. Temperature is folded into the context. So the plain inner product is the policy's logit,
and changing the temperature changes no item vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_array, category_values, hash_values, is_text
from offtower.data.encoding import to_tensors
from offtower.data.manifest import parquet_files, read_manifest
from offtower.data.schema import CatalogueSchema
from offtower.errors import DataError, RunError
from offtower.models.policy import TwoTowerPolicy
from offtower.progress import Progress

Dtype = Literal["float32", "float16", "int8"]

CHUNK = 65_536
_TOWER_ROWS = 8_192
"""Items that go through the tower at once; larger buffers come from and go to the system anew."""


@dataclass(frozen=True)
class Streamed:
    """What was written."""

    count: int
    text_ids: bool
    fingerprint: str | None
    """Of the catalogue, where offtower wrote it."""
    ids_sha256: str


class CatalogueStream:
    """A catalogue directory read a chunk at a time, each chunk checked as a catalogue is."""

    def __init__(self, path: str | Path, schema: CatalogueSchema | None = None) -> None:
        self.path = Path(path)
        self.files = parquet_files(self.path, "catalogue")
        manifest = read_manifest(self.path) if self.path.is_dir() else None
        self.fingerprint = None if manifest is None else str(manifest.get("fingerprint"))
        if schema is None:
            if manifest is None:
                raise DataError(
                    f"'{self.path}' was not written by offtower, so the config must state "
                    "data.catalogue_schema (item_id and features)"
                )
            schema = CatalogueSchema.from_dict(manifest["schema"])
        self.schema = schema
        try:
            self.num_items = sum(pq.read_metadata(file).num_rows for file in self.files)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"the catalogue at '{self.path}' cannot be read: {error}") from error
        if self.num_items == 0:
            raise DataError(f"the catalogue at '{self.path}' has no items")

    def chunks(self, rows: int = CHUNK) -> Iterator[Catalogue]:
        columns = list(self.schema.columns)
        for file in self.files:
            try:
                with pq.ParquetFile(file) as opened:
                    missing = [name for name in columns if name not in opened.schema_arrow.names]
                    if missing:
                        raise DataError(f"'{file}' has no column '{missing[0]}'")
                    for groups in _row_groups(opened.metadata, rows):
                        for batch in opened.iter_batches(rows, groups, columns):
                            if batch.num_rows:
                                table = pa.Table.from_batches([batch])
                                yield Catalogue(table, self.schema, fingerprint="a part")
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"'{file}' is not a readable Parquet file: {error}") from error


def _row_groups(metadata: Any, rows: int) -> Iterator[list[int]]:
    """Row groups to read together, of about `rows` rows: a reader of the whole file holds on to
    what it has read."""
    together: list[int] = []
    count = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if together and count + size > rows:
            yield together
            together, count = [], 0
        together.append(group)
        count += size
    if together:
        yield together


@torch.no_grad()
def write_vectors(
    policy: TwoTowerPolicy,
    catalogue: CatalogueStream,
    directory: Path,
    *,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Streamed:
    """Embed every item and write vectors.npy (N, D) float32 and ids.arrow.

    Memory is O(chunk) and 8 bytes an item, by which duplicate ids are found.

    Raises:
        DataError: an id is null or stands twice, a feature is bad, an embedding is not finite.
    """
    progress = progress or Progress()
    policy.eval()
    n, dim = catalogue.num_items, query_dim(policy)
    vectors: Any = np.lib.format.open_memmap(
        directory / "vectors.npy", mode="w+", dtype=np.float32, shape=(n, dim)
    )
    keys = np.empty(n, dtype=np.uint64)
    first, text, kind = 0, False, pa.int64()
    writer: pa.RecordBatchFileWriter | None = None
    progress.start("embedding items", n)
    sink = pa.OSFile(str(directory / "ids.arrow"), "wb")
    try:
        for part in catalogue.chunks(chunk):
            last = first + part.num_items
            ids = as_array(part.item_ids)
            text = is_text(ids.type)
            vectors[first:last] = embed_part(policy, part)
            keys[first:last] = id_keys(ids)
            if writer is None:
                kind = pa.large_string() if text else pa.int64()
                writer = pa.ipc.new_file(sink, pa.schema([("item_id", kind)]))
            elif text != pa.types.is_large_string(kind):
                raise DataError(
                    "item ids are text in one file of the catalogue, numbers in another"
                )
            column = pc.cast(category_values(ids), kind)
            writer.write_batch(pa.record_batch([column], names=["item_id"]))
            progress.advance(part.num_items)
            first = last
    finally:
        if writer is not None:
            writer.close()
        sink.close()
        progress.finish()
    vectors.flush()
    digest = _sha(keys)
    _check_unique(keys, directory)
    return Streamed(n, text, catalogue.fingerprint, digest)


def embed_part(policy: TwoTowerPolicy, part: Catalogue) -> NDArray[np.float32]:
    """(n, D) vectors of some items.

    Raises:
        DataError: a vector is not finite; the item is named.
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
            + ": the policy's weights or the item's features hold NaN or overflow; look at "
            "metrics.jsonl, and train again"
        )
    return out


def query_dim(policy: TwoTowerPolicy) -> int:
    """D: the embedding's dimension, and one more where items have a bias."""
    return policy.config.embedding_dim + int(policy.config.item_bias)


def quantise(
    vectors: NDArray[np.float32], dtype: Dtype, directory: Path, name: str, chunk: int = CHUNK
) -> NDArray[np.float32] | None:
    """Write vectors in another precision.

    int8 has one scale a coordinate, v = scale * q, so <u * scale, q> is an inner product.

    Returns:
        (D,) scale of int8, else None.

    Raises:
        DataError: a number is beyond what float16 holds.
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
            f"an item vector holds {float(largest.max()):.3g}, which half precision cannot; "
            "export with dtype float32 or int8"
        )
    target: Any = np.lib.format.open_memmap(
        directory / name, mode="w+", dtype=np.dtype(dtype), shape=(n, dim)
    )
    for first in range(0, n, chunk):
        part = vectors[first : first + chunk]
        if scale is not None:
            part = np.rint(part / scale)
        target[first : first + chunk] = part.astype(np.dtype(dtype))
    target.flush()
    return scale


def load_ids(path: Path, count: int) -> pa.ChunkedArray:
    """Item ids, memory-mapped.

    Raises:
        RunError: the file is damaged or holds another number of ids.
    """
    try:
        # A mapped file stays open as long as its columns live.
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise RunError(f"'{path}' cannot be read: {error}; export again") from error
    if table.num_rows != count:
        raise RunError(f"'{path}' holds {table.num_rows:,} ids, expected {count:,}; export again")
    return table.column("item_id")


def load_vectors(path: Path, count: int, dim: int, dtype: str) -> NDArray[Any]:
    """Item vectors, memory-mapped read-only.

    Raises:
        RunError: the file is damaged, or its shape or dtype is not the manifest's.
    """
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RunError(f"'{path}' cannot be read: {error}; export again") from error
    if vectors.shape != (count, dim) or vectors.dtype != np.dtype(dtype):
        raise RunError(
            f"'{path}' holds {vectors.shape} {vectors.dtype}, the manifest says "
            f"{(count, dim)} {dtype}; export again"
        )
    return vectors


def id_keys(ids: pa.Array | pa.ChunkedArray) -> NDArray[np.uint64]:
    """64-bit keys of ids: numbers as they are, hashes of text."""
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks)
    if is_text(ids.type):
        return hash_values(ids)
    values: NDArray[Any] = category_values(ids).to_numpy(zero_copy_only=False)
    return values.astype(np.int64).view(np.uint64)


def _check_unique(keys: NDArray[np.uint64], directory: Path) -> None:
    """Refuse an id that stands twice. Sorts `keys` in place."""
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


def _sha(keys: NDArray[np.uint64]) -> str:
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(keys).data).hexdigest()
