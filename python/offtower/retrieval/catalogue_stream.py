"""A catalogue that is never in memory as a whole: read a chunk, or a range of items, at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from offtower.data.catalogue import Catalogue
from offtower.data.manifest import parquet_files, read_manifest
from offtower.data.schema import CatalogueSchema
from offtower.errors import DataError

CHUNK = 65_536


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
            self.counts = [pq.read_metadata(file).num_rows for file in self.files]
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"the catalogue at '{self.path}' cannot be read: {error}") from error
        self.num_items = sum(self.counts)
        if self.num_items == 0:
            raise DataError(f"the catalogue at '{self.path}' has no items")

    def chunks(self, rows: int = CHUNK, items: range | None = None) -> Iterator[Catalogue]:
        """Items in chunks of `rows`, in order; the last chunk of a file may be shorter.

        items: numbers of the items to read, in place of all; its start is one of `starts`.
        """
        items = range(self.num_items) if items is None else items
        first = 0
        for file, count in zip(self.files, self.counts, strict=True):
            start, stop = max(items.start - first, 0), min(items.stop - first, count)
            if start < stop:
                yield from self._file_chunks(file, rows, start, stop)
            first += count

    def starts(self, rows: int = CHUNK) -> list[int]:
        """Number of the first item of each chunk."""
        found: list[int] = []
        first = 0
        for count in self.counts:
            found += range(first, first + count, rows)
            first += count
        return found

    def _file_chunks(self, file: Path, rows: int, start: int, stop: int) -> Iterator[Catalogue]:
        columns = list(self.schema.columns)
        try:
            with pq.ParquetFile(file) as opened:
                missing = [name for name in columns if name not in opened.schema_arrow.names]
                if missing:
                    raise DataError(f"'{file}' has no column '{missing[0]}'")
                # Only row groups that hold the items are read; then the cut is by item number.
                at, groups = 0, []
                skipped = 0
                for group in range(opened.metadata.num_row_groups):
                    count = opened.metadata.row_group(group).num_rows
                    if at + count <= start:
                        skipped += count
                    elif at < stop:
                        groups.append(group)
                    at += count
                # A group at a time: a reader of several holds on to what it has read.
                read = chain.from_iterable(
                    opened.iter_batches(batch_size=rows, columns=columns, row_groups=[group])
                    for group in groups
                )
                for table in _cut(read, start - skipped, stop - skipped, rows):
                    yield Catalogue(table, self.schema, fingerprint="a part")
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"'{file}' is not a readable Parquet file: {error}") from error


def _cut(batches: Iterable[pa.RecordBatch], start: int, stop: int, rows: int) -> Iterator[pa.Table]:
    """Rows start..stop-1 in tables of `rows`; the last may be shorter."""
    waiting: list[pa.RecordBatch] = []
    held, at = 0, 0
    for batch in batches:
        first, last = max(start - at, 0), min(stop - at, batch.num_rows)
        at += batch.num_rows
        while first < last:
            piece = batch.slice(first, min(rows - held, last - first))
            waiting.append(piece)
            held += piece.num_rows
            first += piece.num_rows
            if held == rows:
                yield pa.Table.from_batches(waiting).combine_chunks()
                waiting, held = [], 0
        if at >= stop:
            break
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks()
