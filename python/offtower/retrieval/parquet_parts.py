"""Item vectors as Parquet, for databases and vector stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from offtower.atomic import replace_file
from offtower.data.array_files import map_array
from offtower.execution import LOCAL, Execution
from offtower.retrieval.catalogue_stream import CHUNK, CatalogueStream
from offtower.retrieval.vectors import load_ids

Layout = Literal["offtower", "vector_db"]

ROWS_PER_PART = 4_194_304


@dataclass(frozen=True)
class ParquetSource:
    """What the rows of Parquet parts are made of, by name, so that other processes can open it.

    Attributes:
        vectors: files of the parts of the (N, D) vectors.
        ids: file of the (N,) ids.
        layout: "offtower" has columns item_id and embedding; "vector_db" id (text), values and
            metadata (JSON text).
        fixed_size: fixed-size lists; plain lists otherwise.
        metadata: catalogue whose features are the metadata of "vector_db"; {} without one.
    """

    vectors: tuple[Path, ...]
    ids: Path
    layout: Layout = "offtower"
    fixed_size: bool = True
    metadata: CatalogueStream | None = None

    def tables(self, rows: range, chunk: int) -> Iterator[pa.Table]:
        """Yield some rows, in tables of `chunk`."""
        vectors = map_array(self.vectors)
        ids = load_ids(self.ids, len(vectors))
        texts = (
            metadata_texts(self.metadata, chunk, rows)
            if self.metadata is not None and self.layout == "vector_db"
            else None
        )
        for first in range(rows.start, rows.stop, chunk):
            last = min(first + chunk, rows.stop)
            flat = pa.array(np.ascontiguousarray(vectors[first:last]).reshape(-1))
            column: pa.Array = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            if not self.fixed_size:
                column = column.cast(pa.list_(flat.type))
            key = ids.slice(first, last - first).combine_chunks()
            if self.layout == "offtower":
                yield pa.table({"item_id": key, "embedding": column})
                continue
            metadata = ["{}"] * (last - first) if texts is None else next(texts)
            yield pa.table(
                {"id": pc.cast(key, pa.string()), "values": column, "metadata": metadata}
            )


def write_parquet(
    source: ParquetSource,
    rows: int,
    directory: Path,
    *,
    chunk: int = CHUNK,
    execution: Execution = LOCAL,
) -> None:
    """Write Parquet parts with one row per item, for databases and vector stores.

    Args:
        rows: N.
        execution: writes the parts, with the same bytes for any number of workers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = [
        (number, range(start, min(start + ROWS_PER_PART, rows)))
        for number, start in enumerate(range(0, rows, ROWS_PER_PART))
    ]
    write = partial(_write_part, source, directory.resolve(), chunk)
    for _ in execution.mapper.map(write, parts, "writing Parquet parts"):
        pass


def _write_part(
    source: ParquetSource, directory: Path, chunk: int, part: tuple[int, range]
) -> None:
    """Write one part (idempotent)."""
    number, rows = part
    tables = source.tables(rows, chunk)
    head = next(tables)
    with (
        replace_file(directory / f"part-{number:05d}.parquet") as path,
        pq.ParquetWriter(path, head.schema, compression="zstd", use_dictionary=False) as writer,
    ):
        for table in chain([head], tables):
            writer.write_table(table)


def metadata_texts(
    catalogue: CatalogueStream, chunk: int = CHUNK, items: range | None = None
) -> Iterator[list[str]]:
    """JSON text of each item's features except vectors, in chunks of exactly `chunk` items (the
    last may be shorter).

    Args:
        items: numbers of the items, which are all by default.
    """
    specs = [spec for spec in catalogue.schema.features if spec.kind != "vector"]
    waiting: list[str] = []
    for part in catalogue.chunks(chunk, items):
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
