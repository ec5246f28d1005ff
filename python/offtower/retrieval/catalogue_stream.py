"""Read a catalogue in chunks, or a range of its items, without loading it as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import pyarrow as pa

from offtower.data.catalogue import Catalogue
from offtower.data.eligible_schema import EligibleSchema
from offtower.data.location import AnyPath, Location
from offtower.data.manifest import find_parquet_files, read_manifest
from offtower.data.parquet import RowGroups, listed_footers
from offtower.data.parquet_checksums import UNREADABLE, open_parquet
from offtower.data.schema import CatalogueSchema
from offtower.errors import DataError

CHUNK = 65_536


class CatalogueStream:
    """A catalogue directory, read and validated in chunks."""

    def __init__(self, path: AnyPath, schema: CatalogueSchema | None = None) -> None:
        self.path = Location.of(path)
        found = find_parquet_files(self.path, "catalogue")
        self.files = [one.location for one in found]
        manifest = None if self.files == [self.path] else read_manifest(self.path)
        self.fingerprint = None if manifest is None else str(manifest.get("fingerprint"))
        if schema is None:
            if manifest is None:
                raise DataError(
                    f"'{self.path}' was not written by offtower, so the config must state "
                    "data.catalogue_schema (item_id and features)"
                )
            schema = CatalogueSchema.from_dict(manifest["schema"])
        self.schema = schema
        footers = listed_footers(self.path, found, manifest)
        self._sizes = [[rows for rows, _ in footer.row_groups] for footer in footers]
        columns = self.schema.columns
        self._lacking = [[c for c in columns if c not in f.columns.names] for f in footers]
        self._groups = RowGroups(self.files, footers)
        self._checked = [footer.checksums is not None for footer in footers]
        self.counts = [sum(sizes) for sizes in self._sizes]
        self.num_items = sum(self.counts)
        if self.num_items == 0:
            raise DataError(f"the catalogue at '{self.path}' has no items")

    def keeping(self, section: EligibleSchema | None) -> CatalogueStream:
        """Return the stream with the columns that a log schema's section `eligible` reads."""
        schema = self.schema.keeping(section)
        return self if schema is self.schema else CatalogueStream(self.path, schema)

    def chunks(self, rows: int = CHUNK, items: range | None = None) -> Iterator[Catalogue]:
        """Yield items in order, in chunks of `rows`; the last chunk of a file may be shorter.

        Args:
            items: item numbers to read; all by default. Their start must be one of `starts`.
        """
        items = range(self.num_items) if items is None else items
        first = 0
        for number, count in enumerate(self.counts):
            start, stop = max(items.start - first, 0), min(items.stop - first, count)
            if start < stop:
                yield from self._file_chunks(number, rows, start, stop)
            first += count

    def starts(self, rows: int = CHUNK) -> list[int]:
        """Return the number of the first item of each chunk."""
        found: list[int] = []
        first = 0
        for count in self.counts:
            found += range(first, first + count, rows)
            first += count
        return found

    def _file_chunks(self, number: int, rows: int, start: int, stop: int) -> Iterator[Catalogue]:
        if self._lacking[number]:
            raise DataError(f"'{self.files[number]}' has no column '{self._lacking[number][0]}'")
        # Only row groups that hold the items are read; then the cut is by item number.
        at, groups = 0, []
        skipped = 0
        for group, count in enumerate(self._sizes[number]):
            if at + count <= start:
                skipped += count
            elif at < stop:
                groups.append(group)
            at += count
        for table in _cut(
            self._batches(number, groups, rows), start - skipped, stop - skipped, rows
        ):
            yield Catalogue(table, self.schema, fingerprint="a part")

    def _batches(self, number: int, groups: list[int], rows: int) -> Iterator[pa.RecordBatch]:
        file, columns = self.files[number], list(self.schema.columns)
        if file.local is None or self._checked[number]:
            first = sum(len(sizes) for sizes in self._sizes[:number])
            for table in self._groups.read_many([first + group for group in groups], columns):
                yield from table.to_batches(max_chunksize=rows)
            return
        try:
            with open_parquet(file.local) as opened:
                # A group at a time: a reader of several holds on to what it has read.
                yield from chain.from_iterable(
                    opened.iter_batches(batch_size=rows, columns=columns, row_groups=[group])
                    for group in groups
                )
        except UNREADABLE as error:
            raise DataError(f"'{file}' is not a readable Parquet file: {error}") from error


def _cut(batches: Iterable[pa.RecordBatch], start: int, stop: int, rows: int) -> Iterator[pa.Table]:
    """Yield rows start..stop-1 in tables of `rows`; the last may be shorter."""
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
