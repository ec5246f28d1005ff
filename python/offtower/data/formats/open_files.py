"""Open files of each format: text by its header and first lines, others by their schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from offtower.data.formats import columnar, csv_files, json_lines
from offtower.data.formats.cells import TimeForm
from offtower.data.formats.kinds import ColumnKind
from offtower.data.formats.options import EPOCH_UNITS, FileFormat
from offtower.data.formats.source_file import RawBatch, SourceFile, check_columns
from offtower.data.formats.streams import TextFile, file_type
from offtower.data.formats.time_columns import PEEKED_CELLS, first_time_form, time_type
from offtower.data.formats.types import EXPECTED, is_string, plain_type, target_type
from offtower.data.location import ListedFile, Location
from offtower.errors import DataError


@dataclass(frozen=True, kw_only=True)
class _Text(SourceFile):
    file: TextFile

    @property
    def text(self) -> TextFile:
        return self.file


@dataclass(frozen=True, kw_only=True)
class _CsvFile(_Text):
    headers: Mapping[str, str]
    """Names of columns as they stand in the header."""

    def _read(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        # Some column must be read, so that rows are counted.
        raw = [self.headers[name] for name in names] or list(self.headers.values())[:1]
        for batch, bad in csv_files.read_batches(self.file, raw):
            yield batch.rename_columns(list(names) or raw), () if bad is None else (bad,)


@dataclass(frozen=True)
class _JsonFile(_Text):
    def _read(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        yield from json_lines.read_batches(self.file, {name: self.kinds[name] for name in names})


@dataclass(frozen=True, kw_only=True)
class _ColumnarFile(SourceFile):
    fragment: Any

    @property
    def row_groups(self) -> list[tuple[int, int]] | None:
        return columnar.row_groups(self.fragment)

    def subset(self, groups: Sequence[int]) -> SourceFile:
        return replace(self, fragment=self.fragment.subset(row_group_ids=list(groups)))

    def _read(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        for batch in self.fragment.to_batches(columns=list(names), batch_size=most_rows):
            if batch.num_rows:
                yield batch, ()


def _open_csv(
    listed: ListedFile,
    kinds: Mapping[str, ColumnKind],
    file_format: FileFormat,
    partition: dict[str, str | None],
) -> SourceFile:
    kind = file_type(listed.location, file_format)
    assert kind is not None
    file = TextFile(listed.location, kind, file_format)
    raw, rows = csv_files.read_header(file)
    names = [name.strip() for name in raw] if file_format.trim else raw
    check_columns(listed.location, names, kinds, partition, file_format)
    headers = {name: raw[names.index(name)] for name in kinds if name in names}
    partition = {name: value for name, value in partition.items() if name not in headers}
    types: dict[str, pa.DataType] = {}
    for name, what in kinds.items():
        if what != "time":
            types[name] = plain_type(what)
            continue
        if name in headers:
            values = [] if rows is None else rows.column(headers[name])[:PEEKED_CELLS].to_pylist()
            cells = [cell.decode("utf-8", "replace") for cell in values if cell is not None]
        else:
            cells = [partition[name]]
        types[name] = time_type(cells, name, file, file_format)
    return _CsvFile(
        listed.location, listed.name, kinds, types, partition, file=file, headers=headers
    )


def _open_json(
    listed: ListedFile,
    kinds: Mapping[str, ColumnKind],
    file_format: FileFormat,
    partition: dict[str, str | None],
) -> SourceFile:
    file = TextFile(listed.location, "jsonl", file_format)
    found = json_lines.peek(file, kinds)
    partition = {name: value for name, value in partition.items() if name not in found}
    missing = [name for name in kinds if name not in found and name not in partition]
    if missing and found:
        raise DataError(
            f"the first lines of '{listed.location}' have no key {', '.join(map(repr, missing))}; "
            "write one that may be missing as null in the first line"
        )
    types = {
        name: time_type(found.get(name, [partition.get(name)]), name, file, file_format)
        if what == "time"
        else plain_type(what)
        for name, what in kinds.items()
    }
    return _JsonFile(listed.location, listed.name, kinds, types, partition, file=file)


def _open_columnar(
    listed: ListedFile,
    kinds: Mapping[str, ColumnKind],
    file_format: FileFormat,
    partition: dict[str, str | None],
) -> SourceFile:
    kind = file_type(listed.location, file_format)
    assert kind is not None
    fragment = columnar.open_fragment(listed.location, kind)
    schema = fragment.physical_schema
    columnar.row_groups(fragment)  # A truncated file fails here.
    check_columns(listed.location, schema.names, kinds, partition, file_format)
    partition = {name: value for name, value in partition.items() if name not in schema.names}
    types: dict[str, pa.DataType] = {}
    for name, what in kinds.items():
        found = pa.string() if name in partition else schema.field(name).type
        form: TimeForm | None = None
        if what == "time":
            if is_string(found):
                form = _peeked_form(fragment, name, partition, file_format, listed.location)
            elif file_format.time in EPOCH_UNITS or file_format.zone is not None:
                form = "zoned" if file_format.time in EPOCH_UNITS or _is_time(found) else None
        large = pa.types.is_uint64(found) and columnar.exceeds_int64(fragment, name)
        target = target_type(what, found, form, large)
        if target is None:
            raise DataError(
                f"'{listed.location}': column '{name}' holds {found}, expected {EXPECTED[what]}"
            )
        types[name] = target
    return _ColumnarFile(listed.location, listed.name, kinds, types, partition, fragment=fragment)


OPENERS = {
    "csv": _open_csv,
    "tsv": _open_csv,
    "jsonl": _open_json,
    "parquet": _open_columnar,
    "arrow": _open_columnar,
}


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _peeked_form(
    fragment: Any,
    name: str,
    partition: Mapping[str, str | None],
    file_format: FileFormat,
    location: Location,
) -> TimeForm | None:
    if name in partition:
        cells = [partition[name]]
    else:
        head = fragment.head(PEEKED_CELLS, columns=[name]).column(name)
        cells = [
            cell.decode("utf-8", "replace") if isinstance(cell, bytes) else cell
            for cell in head.to_pylist()
        ]
    return first_time_form(cells, name, str(location), file_format)
