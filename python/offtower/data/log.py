"""Logs of shown items, read by row group."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offtower.data.content import LogContent
from offtower.data.formats.bad_cells import BadCells
from offtower.data.formats.streams import TextFile
from offtower.data.location import AnyPath, Location
from offtower.data.manifest import find_parquet_files, read_manifest, write_manifest
from offtower.data.output import new_directory, new_file
from offtower.data.parquet import Footer, RowGroups, listed_footers, read_footers
from offtower.data.round_tables import cut_rounds, table_cuts
from offtower.data.schema import LogSchema
from offtower.errors import DataError

ROWS_PER_GROUP = 65_536
ROWS_PER_FILE = 1_048_576


class TableOrigin(NamedTuple):
    """Where the rows of a table come from, for messages.

    Attributes:
        file: its name.
        row_group: in the file; None where this is not known.
        file_row: number in the file of the table's first row; None where the rows are in memory.
        text: the file where it is text, whose lines can be counted.
        bad_cells: cells that could not be read, by their rows in the file.
    """

    file: str
    row_group: int | None = None
    file_row: int | None = None
    text: TextFile | None = None
    bad_cells: tuple[BadCells, ...] = ()

    @property
    def key(self) -> TableOrigin:
        """The origin without bad cells, which can be hashed."""
        return self._replace(bad_cells=())

    def bad_cells_of(self, rows: int) -> list[BadCells]:
        """Bad cells of a table of that many rows, by their rows in it."""
        if self.file_row is None or not self.bad_cells:
            return []
        found = [one.between(self.file_row, self.file_row + rows) for one in self.bad_cells]
        return [one for one in found if one.rows.size]

    def lines(self, rows: Sequence[int]) -> list[int | None]:
        """Lines of the file where rows of the table begin, from 1; None where they are not known.

        Args:
            rows: increasing.
        """
        if self.text is None or self.file_row is None:
            return [None] * len(rows)
        return self.text.lines([self.file_row + row for row in rows])

    def place(self, row: int) -> str:
        """File and line of a row of the table, or its number in the file."""
        line = self.lines([row])[0]
        if line is not None:
            return f"{self.file}, line {line}"
        return self.file if self.file_row is None else f"{self.file}, row {self.file_row + row}"


class Log(ABC):
    """Rows in row groups, the unit of reading and shuffling."""

    schema: LogSchema
    row_group_sizes: NDArray[np.int64]
    fingerprint: str
    """sha256 of the schema and the content: of the files' checksums where a manifest has them, else
    of their footers (sizes and statistics of all column chunks)."""

    @property
    def num_rows(self) -> int:
        return int(self.row_group_sizes.sum())

    @abstractmethod
    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a row group; by default all columns of the schema."""

    @abstractmethod
    def location(self, index: int) -> TableOrigin:
        """Return the origin of a row group."""

    @property
    def first_rows(self) -> NDArray[np.int64]:
        """(g,) number of each row group's first row in the log."""
        return np.concatenate([[0], np.cumsum(self.row_group_sizes)[:-1]]).astype(np.int64)

    def read_row_groups(
        self, indexes: Iterable[int], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """Read row groups in the given order; those of a store are read ahead. If the iterator has
        a `close`, any thread may call it."""
        return map(self.read_row_group, indexes, itertools.repeat(columns))

    def tables(self) -> Iterator[pa.Table]:
        """Read all row groups, in order."""
        return self.read_row_groups(range(len(self.row_group_sizes)))


class ParquetLog(Log):
    """A directory of Parquet files, in the order of their names.

    Args:
        files: in the order of the rows.
        schema: the columns to use.
        footers: of the files, where they are known already.

    Attributes:
        content: identity of the files, whatever their names and the schema.
    """

    def __init__(
        self,
        files: Sequence[AnyPath],
        schema: LogSchema,
        footers: Iterable[Footer] | None = None,
    ) -> None:
        if schema.outcomes is not None:
            raise DataError(
                "the log schema has a section 'outcomes': rows may be pending. Ingest the log with "
                "this schema (offtower ingest), and use the log that it writes"
            )
        self.schema = schema
        self._files = [Location.of(file) for file in files]
        digest = hashlib.sha256(repr(schema).encode())
        first: pa.Schema | None = None
        footers = read_footers(self._files) if footers is None else footers
        known: list[Footer] = []
        seen: pa.Schema | None = None
        for file, footer in zip(self._files, footers, strict=True):
            if footer.columns is not seen:  # Listed files share one object.
                seen, selected = footer.columns, _selected(file, footer.columns, schema)
            if first is None:
                first = selected
            elif not selected.equals(first):
                name = next(n for n in schema.columns if selected.field(n) != first.field(n))
                raise DataError(
                    f"column '{name}' is {selected.field(name).type} in '{file}' but "
                    f"{first.field(name).type} in '{self._files[0]}'; write all files alike"
                )
            digest.update(f"{file.name},{footer.digest};".encode())
            known.append(footer)
        rows_of = [rows for footer in known for rows, _ in footer.row_groups]
        self.row_group_sizes = np.asarray(rows_of, dtype=np.int64)
        if self.num_rows == 0:
            raise DataError(f"the log at '{self._files[0].parent}' has no rows")
        self.fingerprint = digest.hexdigest()
        self.content = LogContent.of(known)
        self._groups = RowGroups(self._files, known)

    @classmethod
    def open(cls, path: AnyPath, schema: LogSchema | None = None) -> ParquetLog:
        """Open a directory by its manifest, or by the footers of files that it does not list.

        Raises:
            DataError: nothing is there, a file is not Parquet or truncated, files differ in their
                columns, a column of the schema is missing, there are no rows, or a file that the
                manifest lists is missing, damaged or another one.
        """
        path = Location.of(path)
        found = find_parquet_files(path, "log")
        folder = found[0].location != path
        manifest = read_manifest(path) if folder else None
        if schema is None:
            if manifest is None:
                raise DataError(
                    f"'{path}' was not written by offtower, so its columns are unknown: "
                    "run offtower ingest on it first, or state data.log_schema (action, reward, "
                    "pscore and the context features) in the config"
                )
            if "item_id" in manifest["schema"]:
                raise DataError(f"'{path}' holds a catalogue, and a log belongs here")
            schema = LogSchema.from_dict(manifest["schema"])
        files = [one.location for one in found]
        return cls(files, schema, listed_footers(path, found, manifest))

    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        return self._groups.read(index, list(columns or self.schema.columns))

    def read_row_groups(
        self, indexes: Iterable[int], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        return self._groups.read_many(list(indexes), list(columns or self.schema.columns))

    def location(self, index: int) -> TableOrigin:
        file, group = self._groups.location(index)
        return TableOrigin(str(file), group, int(self.row_group_sizes[index - group : index].sum()))

    def footers(self) -> Iterator[Footer]:
        """The footer of each file, read anew."""
        return read_footers(self._files)


def _selected(file: Location, arrow: pa.Schema, schema: LogSchema) -> pa.Schema:
    """Return the types of the schema's columns; nullability is ignored."""
    missing = [name for name in schema.columns if name not in arrow.names]
    if missing:
        raise DataError(
            f"'{file}' has no column '{missing[0]}', which the schema names; "
            f"it has {', '.join(arrow.names)}"
        )
    return pa.schema([(name, arrow.field(name).type) for name in schema.columns])


def one_item_a_round(log: Log) -> bool:
    """Whether all positions are 0. Reads their column up to the first that is not."""
    position = log.schema.position
    if position is None:
        return True
    tables = log.read_row_groups(range(len(log.row_group_sizes)), [position])
    return all(pc.max(table.column(position)).as_py() <= 0 for table in tables)


class TableLog(Log):
    """A log in memory."""

    def __init__(self, table: pa.Table, schema: LogSchema, rows_per_group: int = 65_536) -> None:
        missing = [name for name in schema.columns if name not in table.column_names]
        if missing:
            raise DataError(
                f"the table has no column '{missing[0]}', which the schema names; "
                f"it has {', '.join(table.column_names)}"
            )
        if table.num_rows == 0:
            raise DataError("the log has no rows")
        self.schema = schema
        self.table = table
        self._edges = table_cuts(table, schema, rows_per_group)
        self.row_group_sizes = np.diff(self._edges).astype(np.int64)
        digest = hashlib.sha256(repr(schema).encode())
        for batch in table.select(list(schema.columns)).combine_chunks().to_batches():
            digest.update(batch.serialize())
        self.fingerprint = digest.hexdigest()

    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        part = self.table.slice(self._edges[index], int(self.row_group_sizes[index]))
        return part if columns is None else part.select(list(columns))

    def location(self, index: int) -> TableOrigin:
        return TableOrigin("table in memory", index)


def write_log(
    directory: AnyPath,
    batches: Iterable[pa.Table | pa.RecordBatch],
    schema: LogSchema,
    rows_per_group: int = ROWS_PER_GROUP,
    rows_per_file: int = ROWS_PER_FILE,
) -> dict[str, Any]:
    """Write rows as a directory that `ParquetLog.open` reads, atomically (`data.output`).

    The files do not depend on the sizes of the incoming batches. Columns beyond the schema's are
    kept. `data.parts.write_log_parts` writes the same files with many workers.

    Returns:
        The manifest: schema, num_rows, fingerprint.

    Raises:
        DataError: the directory exists, a column is missing, or there are no rows.
    """
    directory = Location.of(directory)
    with new_directory(directory) as temporary:
        groups = regroup(batches, rows_per_group, schema)
        group = next(groups, None)
        if group is None:
            raise DataError(f"no rows to write to '{directory}'")
        footers: list[Footer] = []
        while group is not None:
            in_file = itertools.islice(groups, max(1, rows_per_file // rows_per_group) - 1)
            number = len(footers)
            footers.append(write_log_file(temporary, number, itertools.chain([group], in_file)))
            group = next(groups, None)
        return finish_log(temporary, schema, footers)


def write_log_file(directory: Location, number: int, groups: Iterable[pa.Table]) -> Footer:
    """Write one file of a log, whole or not at all; each table becomes a row group."""
    writer: pq.ParquetWriter | None = None
    with new_file(directory / _file_name(number)) as temporary:
        try:
            for group in groups:
                if writer is None:
                    writer = pq.ParquetWriter(
                        temporary, group.schema, compression="zstd", write_page_checksum=True
                    )
                writer.write_table(group, row_group_size=group.num_rows)
        finally:
            if writer is not None:
                writer.close()
        return Footer.of_written(temporary)


def finish_log(directory: Location, schema: LogSchema, footers: Sequence[Footer]) -> dict[str, Any]:
    """Write the manifest of a log whose files are written; `footers` in their order."""
    names = [_file_name(number) for number in range(len(footers))]
    log = ParquetLog([directory / name for name in names], schema, footers)
    listed = [footer.to_dict(name) for name, footer in zip(names, footers, strict=True)]
    return write_manifest(directory, schema.to_dict(), log.num_rows, log.fingerprint, listed)


def _file_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def regroup(
    batches: Iterable[pa.Table | pa.RecordBatch],
    rows_per_group: int,
    schema: LogSchema,
    first_row: int = 0,
) -> Iterator[pa.Table]:
    """Regroup rows into tables of `rows_per_group`; the last may be shorter.

    Rounds of slates stay whole: a table begins with the first round at or after each multiple of
    `rows_per_group`, counted from the log's first row.

    Args:
        first_row: number in the log of the first row.
    """
    alike = _of_one_type(batches)
    if schema.slates:
        yield from cut_rounds(alike, schema, rows_per_group, first_row)
        return
    waiting: list[pa.Table] = []
    rows = 0
    for table in alike:
        start = 0
        while start < table.num_rows:
            piece = table.slice(start, min(rows_per_group - rows, table.num_rows - start))
            waiting.append(piece)
            rows += piece.num_rows
            start += piece.num_rows
            if rows == rows_per_group:
                yield pa.concat_tables(waiting).combine_chunks()
                waiting, rows = [], 0
    if rows:
        yield pa.concat_tables(waiting).combine_chunks()


def _of_one_type(batches: Iterable[pa.Table | pa.RecordBatch]) -> Iterator[pa.Table]:
    first: pa.Schema | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        table = table.replace_schema_metadata(None)
        if first is None:
            first = table.schema
        elif table.schema != first:
            raise DataError(f"the tables to write differ: {_difference(first, table.schema)}")
        yield table


def _difference(first: pa.Schema, other: pa.Schema) -> str:
    if first.names != other.names:
        return f"columns {', '.join(first.names)} and then {', '.join(other.names)}"
    name = next((n for n in first.names if first.field(n) != other.field(n)), "?")
    return f"column '{name}' is {first.field(name).type} and then {other.field(name).type}"
