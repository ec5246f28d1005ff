"""Item vectors as Parquet, for databases and vector stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offtower.retrieval.catalogue_stream import CHUNK, CatalogueStream

Layout = Literal["offtower", "vector_db"]

ROWS_PER_PART = 4_194_304


def write_parquet(
    vectors: NDArray[Any],
    ids: pa.ChunkedArray,
    directory: Path,
    *,
    layout: Layout = "offtower",
    fixed_size: bool = True,
    metadata: Iterator[list[str]] | None = None,
    chunk: int = CHUNK,
) -> None:
    """Write Parquet parts with one row per item, for databases and vector stores.

    Args:
        layout: "offtower" has columns item_id and embedding; "vector_db" id (text), values and
            metadata (JSON text).
        fixed_size: fixed-size lists; plain lists otherwise.
        metadata: JSON texts of the items in chunks of `chunk`, for "vector_db".
    """
    directory.mkdir(parents=True, exist_ok=True)

    def table(first: int, last: int) -> pa.Table:
        flat = pa.array(np.ascontiguousarray(vectors[first:last]).reshape(-1))
        column: pa.Array = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        if not fixed_size:
            column = column.cast(pa.list_(flat.type))
        key = ids.slice(first, last - first).combine_chunks()
        if layout == "offtower":
            return pa.table({"item_id": key, "embedding": column})
        texts = next(metadata) if metadata is not None else ["{}"] * (last - first)
        return pa.table({"id": pc.cast(key, pa.string()), "values": column, "metadata": texts})

    for number, start in enumerate(range(0, len(vectors), ROWS_PER_PART)):
        stop = min(start + ROWS_PER_PART, len(vectors))
        tables = (table(first, min(first + chunk, stop)) for first in range(start, stop, chunk))
        head = next(tables)
        path = directory / f"part-{number:05d}.parquet"
        with pq.ParquetWriter(
            path, head.schema, compression="zstd", use_dictionary=False
        ) as writer:
            for part in chain([head], tables):
                writer.write_table(part)


def metadata_texts(catalogue: CatalogueStream, chunk: int = CHUNK) -> Iterator[list[str]]:
    """JSON text of each item's features except vectors, in chunks of exactly `chunk` items (the
    last may be shorter)."""
    specs = [spec for spec in catalogue.schema.features if spec.kind != "vector"]
    waiting: list[str] = []
    for part in catalogue.chunks(chunk):
        table = part.table(0, part.num_items)
        columns = {spec.name: table.column(spec.source).to_pylist() for spec in specs}
        waiting += [
            json.dumps({name: values[row] for name, values in columns.items()}, default=str)
            for row in range(part.num_items)
        ]
        while len(waiting) >= chunk:
            yield waiting[:chunk]
            waiting = waiting[chunk:]
    if waiting:
        yield waiting
