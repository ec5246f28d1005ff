"""A log: rows of shown items, read by row group and never as a whole."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offtower.atomic import replace_directory, replace_file
from offtower.data.manifest import parquet_files, read_manifest, write_manifest
from offtower.data.schema import LogSchema
from offtower.errors import DataError

ROWS_PER_GROUP = 65_536
ROWS_PER_FILE = 1_048_576


class Log(ABC):
    """Rows in row groups, the unit of reading and of shuffling."""

    schema: LogSchema
    row_group_sizes: NDArray[np.int64]
    fingerprint: str
    """sha256 of the schema and of what identifies the content."""

    @property
    def num_rows(self) -> int:
        return int(self.row_group_sizes.sum())

    @abstractmethod
    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one row group; all the schema's columns where none are named."""

    @abstractmethod
    def location(self, index: int) -> tuple[str, int]:
        """(file, row group inside it) for messages."""

    @property
    def first_rows(self) -> NDArray[np.int64]:
        """(g,) global number of each row group's first row."""
        return np.concatenate([[0], np.cumsum(self.row_group_sizes)[:-1]]).astype(np.int64)

    def tables(self) -> Iterator[pa.Table]:
        """All row groups, in order."""
        for index in range(len(self.row_group_sizes)):
            yield self.read_row_group(index)


class ParquetLog(Log):
    """A directory of Parquet files, in the order of their names."""

    def __init__(self, files: Sequence[Path], schema: LogSchema) -> None:
        self.schema = schema
        self._files = list(files)
        sizes: list[int] = []
        self._places: list[tuple[int, int]] = []
        digest = hashlib.sha256(repr(schema).encode())
        first: pa.Schema | None = None
        for number, file in enumerate(self._files):
            metadata, arrow = _footer(file)
            missing = [name for name in schema.columns if name not in arrow.names]
            if missing:
                raise DataError(
                    f"'{file}' has no column '{missing[0]}', which the schema names; "
                    f"it has {', '.join(arrow.names)}"
                )
            # Types only: whether a column may hold nulls is no difference in content.
            selected = pa.schema([(name, arrow.field(name).type) for name in schema.columns])
            if first is None:
                first = selected
            elif not selected.equals(first):
                name = next(n for n in schema.columns if selected.field(n) != first.field(n))
                raise DataError(
                    f"column '{name}' is {selected.field(name).type} in '{file}' but "
                    f"{first.field(name).type} in '{self._files[0]}'; write all files alike"
                )
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                sizes.append(rows)
                self._places.append((number, group))
                digest.update(f"{rows},{metadata.row_group(group).total_byte_size};".encode())
            digest.update(f"{file.name},{file.stat().st_size};".encode())
        self.row_group_sizes = np.asarray(sizes, dtype=np.int64)
        if self.num_rows == 0:
            raise DataError(f"the log at '{self._files[0].parent}' has no rows")
        self.fingerprint = digest.hexdigest()

    @classmethod
    def open(cls, path: str | Path, schema: LogSchema | None = None) -> ParquetLog:
        """Open a directory; only the files' footers are read.

        Raises:
            DataError: nothing is there, a file is not Parquet or truncated, files differ in their
                columns, a column of the schema is missing, or there are no rows.
        """
        path = Path(path)
        files = parquet_files(path, "log")
        if schema is None:
            manifest = read_manifest(path)
            if manifest is None:
                raise DataError(
                    f"'{path}' was not written by offtower, so the config must state "
                    "data.log_schema (action, reward, pscore and the context features)"
                )
            schema = LogSchema.from_dict(manifest["schema"])
        return cls(files, schema)

    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        number, group = self._places[index]
        file = self._files[number]
        try:
            # Opened for each row group: a log of thousands of files must not hold them all open.
            with pq.ParquetFile(file) as opened:
                return opened.read_row_group(group, columns=list(columns or self.schema.columns))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"row group {group} of '{file}' cannot be read ({error}); "
                "the file is damaged or changed while it was read"
            ) from error

    def location(self, index: int) -> tuple[str, int]:
        number, group = self._places[index]
        return str(self._files[number]), group


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
        self._rows_per_group = rows_per_group
        starts = np.arange(0, table.num_rows, rows_per_group)
        self.row_group_sizes = np.minimum(rows_per_group, table.num_rows - starts).astype(np.int64)
        digest = hashlib.sha256(repr(schema).encode())
        for batch in table.select(list(schema.columns)).combine_chunks().to_batches():
            digest.update(batch.serialize())
        self.fingerprint = digest.hexdigest()

    def read_row_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        part = self.table.slice(index * self._rows_per_group, self._rows_per_group)
        return part if columns is None else part.select(list(columns))

    def location(self, index: int) -> tuple[str, int]:
        return "table in memory", index


def write_log(
    directory: str | Path,
    batches: Iterable[pa.Table | pa.RecordBatch],
    schema: LogSchema,
    rows_per_group: int = ROWS_PER_GROUP,
    rows_per_file: int = ROWS_PER_FILE,
) -> dict[str, Any]:
    """Write rows as a directory that `ParquetLog.open` reads; it appears whole or not at all.

    Rows are regrouped, so the sizes of the incoming batches do not matter. Columns beyond the
    schema's are kept. `data.parts.write_log_parts` writes the same files with many workers.

    Returns:
        The manifest: schema, num_rows, fingerprint.

    Raises:
        DataError: the directory exists, a column is missing, or there are no rows.
    """
    directory = Path(directory)
    if directory.exists():
        raise DataError(f"'{directory}' exists already; choose another folder or remove it")
    with replace_directory(directory) as temporary:
        groups = regroup(batches, rows_per_group)
        group = next(groups, None)
        if group is None:
            raise DataError(f"no rows to write to '{directory}'")
        number = 0
        while group is not None:
            in_file = itertools.islice(groups, max(1, rows_per_file // rows_per_group) - 1)
            write_log_file(temporary, number, itertools.chain([group], in_file))
            group, number = next(groups, None), number + 1
        return finish_log(temporary, schema)


def write_log_file(directory: Path, number: int, groups: Iterable[pa.Table]) -> None:
    """One file of a log, beside and renamed; each table becomes a row group."""
    path = directory / f"part-{number:05d}.parquet"
    writer: pq.ParquetWriter | None = None
    with replace_file(path) as temporary:
        try:
            for group in groups:
                if writer is None:
                    writer = pq.ParquetWriter(temporary, group.schema, compression="zstd")
                writer.write_table(group, row_group_size=group.num_rows)
        finally:
            if writer is not None:
                writer.close()


def finish_log(directory: Path, schema: LogSchema) -> dict[str, Any]:
    """Read the footers of the files of a log, and write its manifest."""
    log = ParquetLog.open(directory, schema)
    return write_manifest(directory, schema.to_dict(), log.num_rows, log.fingerprint)


def regroup(
    batches: Iterable[pa.Table | pa.RecordBatch], rows_per_group: int
) -> Iterator[pa.Table]:
    """The same rows in tables of `rows_per_group`; the rest comes last."""
    first: pa.Schema | None = None
    waiting: list[pa.Table] = []
    rows = 0
    for batch in batches:
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        table = table.replace_schema_metadata(None)
        if first is None:
            first = table.schema
        elif table.schema != first:
            raise DataError(f"the tables to write differ: {_difference(first, table.schema)}")
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


def _difference(first: pa.Schema, other: pa.Schema) -> str:
    if first.names != other.names:
        return f"columns {', '.join(first.names)} and then {', '.join(other.names)}"
    name = next((n for n in first.names if first.field(n) != other.field(n)), "?")
    return f"column '{name}' is {first.field(name).type} and then {other.field(name).type}"


def _footer(file: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with pq.ParquetFile(file) as opened:
            return opened.metadata, opened.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"'{file}' is not a readable Parquet file (truncated, or another format): {error}"
        ) from error
