"""Storage of a catalogue's rows: a table in memory, or Parquet files read by row group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.data.copies import LocalCopies
from offtower.data.location import ListedFile, Location
from offtower.data.parquet import listed_footers, read_row_group
from offtower.errors import DataError

SLICE_ROWS = 65_536
"""Rows of a slice, and of a row group that offtower writes."""


class CatalogueRows(ABC):
    """Rows in a fixed order."""

    schema: pa.Schema
    num_rows: int

    @abstractmethod
    def slice(self, start: int, stop: int) -> pa.Table:
        """Read rows start..stop-1."""

    @abstractmethod
    def column(self, name: str) -> pa.ChunkedArray:
        """Read a whole column."""

    def slices(self, rows: int = SLICE_ROWS) -> Iterator[pa.Table]:
        """Read all rows in slices of equal length, independent of chunks and row groups."""
        for start in range(0, self.num_rows, rows):
            yield self.slice(start, min(start + rows, self.num_rows))


class TableRows(CatalogueRows):
    """A table in memory."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.schema = table.schema
        self.num_rows = table.num_rows

    def slice(self, start: int, stop: int) -> pa.Table:
        return self._table.slice(start, stop - start)

    def column(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name)


class ParquetRows(CatalogueRows):
    """Parquet files of one schema; the row group read last stays in memory.

    Args:
        files: in the order of the items; those of a store are copied to this machine.
        columns: those that are read.
        directory: for messages.
        manifest: of the directory; None where it has none.

    Raises:
        DataError: a file is not Parquet, lacks a column, or differs from the first in its columns;
            or one that the manifest lists is missing, damaged or another one.
    """

    def __init__(
        self,
        files: Sequence[ListedFile],
        columns: Sequence[str],
        directory: Location,
        manifest: Mapping[str, Any] | None,
    ) -> None:
        self._listed = list(files)
        self._files = LocalCopies(files)
        self._columns = list(columns)
        self._groups: list[tuple[int, int]] = []
        sizes: list[int] = []
        copies = [Location.of(self._files.path(number)) for number in range(len(self._files))]
        self._footers = listed_footers(directory, files, manifest, copies)
        for number, footer in enumerate(self._footers):
            file, arrow = self._files.name(number), footer.columns
            missing = [name for name in self._columns if name not in arrow.names]
            if missing:
                raise DataError(
                    f"'{file}' has no column '{missing[0]}'; it has {', '.join(arrow.names)}"
                )
            # Nullability is no difference in content.
            chosen = pa.schema([(name, arrow.field(name).type) for name in self._columns])
            if number == 0:
                self.schema = chosen
            elif not chosen.equals(self.schema):
                name = next(n for n in self._columns if chosen.field(n) != self.schema.field(n))
                raise DataError(
                    f"the files of '{directory}' differ in their columns: '{name}' is "
                    f"{chosen.field(name).type} in '{files[number].location.name}' and "
                    f"{self.schema.field(name).type} in '{files[0].location.name}'"
                )
            for group, (rows, _) in enumerate(footer.row_groups):
                self._groups.append((number, group))
                sizes.append(rows)
        self._ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self.num_rows = int(self._ends[-1]) if sizes else 0
        self._last: tuple[int, pa.Table] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    @property
    def identity(self) -> list[tuple[Any, ...]]:
        """What tells the files' content: the sha256 of those that a manifest lists; of others
        address, size, time of change and footer."""
        return [
            (footer.checksums.sha256,)
            if footer.checksums is not None
            else (str(one.location), one.size, one.mtime_ns, footer.digest)
            for one, footer in zip(self._listed, self._footers, strict=True)
        ]

    def fetch(self) -> None:
        """Copy the files of a store to this machine, where they are not there yet."""
        self._files.path(0)

    def slice(self, start: int, stop: int) -> pa.Table:
        parts = []
        group = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            table = self._row_group(group)
            end = int(self._ends[group])
            first = start - (end - table.num_rows)
            parts.append(table.slice(first, min(stop, end) - start))
            start, group = end, group + 1
        return pa.concat_tables(parts) if parts else self.schema.empty_table()

    def column(self, name: str) -> pa.ChunkedArray:
        parts = []
        for number, group in self._groups:
            parts += self._read(number, group, [name]).column(name).chunks
        return pa.chunked_array(parts, self.schema.field(name).type)

    def _row_group(self, index: int) -> pa.Table:
        if self._last is None or self._last[0] != index:
            self._last = None  # Freed before the next one is read.
            self._last = (index, self._read(*self._groups[index], self._columns))
        return self._last[1]

    def _read(self, number: int, group: int, columns: list[str]) -> pa.Table:
        file = Location.of(self._files.path(number))
        table = read_row_group(
            file, self._footers[number], group, columns, self._files.name(number)
        )
        return table.select(columns).replace_schema_metadata(None)
