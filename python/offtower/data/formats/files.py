"""Files of a source: found, opened, and the types that their columns become."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote

import pyarrow as pa

from offtower.data.formats import columnar, csv_files, json_lines
from offtower.data.formats.bad_cells import BadCells
from offtower.data.formats.cells import TimeForm, time_form
from offtower.data.formats.kinds import ColumnKind
from offtower.data.formats.options import CODECS, ENDINGS, EPOCH_UNITS, FileFormat, FileType
from offtower.data.formats.streams import TextFile, file_type
from offtower.data.formats.types import (
    EXPECTED,
    is_string,
    plain_type,
    target_type,
    unified_type,
)
from offtower.data.location import ListedFile, Location
from offtower.data.stores import advice, retry
from offtower.errors import DataError

R = TypeVar("R")

RawBatch: TypeAlias = tuple[pa.RecordBatch, tuple[BadCells, ...]]
"""Rows as a file types them, and rows or cells that could not be read."""

_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_TIMES_PEEKED = 1000
_BINARY = {
    b"\x1f\x8b": ("gzip data", ".csv.gz, or .jsonl.gz"),
    b"\x28\xb5\x2f\xfd": ("zstd data", ".csv.zst, or .jsonl.zst"),
    b"PAR1\x15": ("Parquet", ".parquet"),
    b"ARROW1\x00": ("Arrow data", ".arrow"),
}
"""What a file holds by its first bytes, and the ending that reads it."""


@dataclass(frozen=True)
class SourceFile:
    """An open file.

    Attributes:
        location: where it is.
        name: path below the source; empty for the source itself.
        kinds: of the columns to read.
        types: that these become, by this file alone; null where it does not say.
        partition: columns whose value the file's folders say.
        row_groups: (number, rows) of each; None of a file without them.
    """

    location: Location
    name: str
    kinds: Mapping[str, ColumnKind]
    types: Mapping[str, pa.DataType]
    partition: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def row_groups(self) -> list[tuple[int, int]] | None:
        return None

    @property
    def text(self) -> TextFile | None:
        """The file where it is text."""
        return None

    def subset(self, groups: Sequence[int]) -> SourceFile:
        """Some row groups of the file."""
        raise NotImplementedError

    def batches(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        """Rows of the columns. Errors are those of pyarrow."""
        inside = [name for name in names if name not in self.partition]
        for batch, bad in self._read(inside, most_rows):
            if len(inside) < len(names):
                batch = self._with_partition(batch, names)
            yield batch, bad

    def _read(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        raise NotImplementedError

    def _with_partition(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        n = batch.num_rows
        arrays = [
            pa.array([self.partition[name]], pa.string()).take(pa.array([0] * n, pa.int32()))
            if name in self.partition
            else batch.column(name)
            for name in names
        ]
        return pa.RecordBatch.from_arrays(arrays, list(names))


@dataclass(frozen=True)
class _CsvFile(SourceFile):
    file: TextFile | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names of columns as they stand in the header."""

    @property
    def text(self) -> TextFile | None:
        return self.file

    def _read(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        assert self.file is not None
        # Some column must be read, so that rows are counted.
        raw = [self.headers[name] for name in names] or list(self.headers.values())[:1]
        for batch, bad in csv_files.read_batches(self.file, raw):
            yield batch.rename_columns(list(names) or raw), () if bad is None else (bad,)


@dataclass(frozen=True)
class _JsonFile(SourceFile):
    file: TextFile | None = None

    @property
    def text(self) -> TextFile | None:
        return self.file

    def _read(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        assert self.file is not None
        yield from json_lines.read_batches(self.file, {name: self.kinds[name] for name in names})


@dataclass(frozen=True)
class _ColumnarFile(SourceFile):
    fragment: Any = None

    @property
    def row_groups(self) -> list[tuple[int, int]] | None:
        return columnar.row_groups(self.fragment)

    def subset(self, groups: Sequence[int]) -> SourceFile:
        return replace(self, fragment=self.fragment.subset(row_group_ids=list(groups)))

    def _read(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        for batch in self.fragment.to_batches(columns=list(names), batch_size=most_rows):
            if batch.num_rows:
                yield batch, ()


def find_files(place: Location, file_format: FileFormat) -> list[ListedFile]:
    """List the files of a source, in the order of their paths.

    Raises:
        DataError: nothing is there, or files are of an unknown type or of several.
    """
    kind = place.kind()
    if kind is None:
        raise DataError(f"there is no file or folder at '{place}'")
    listed = place.files()
    known = ", ".join(ENDINGS)
    if kind == "file":
        if file_type(place, file_format) is None:
            raise DataError(
                f"'{place}' has an unknown ending '{place.suffix}'; known: {known} (text files "
                f"also with {', '.join(CODECS)}). Others are read with format.type"
            )
        return listed
    found = [
        one
        for one in listed
        if not any(part.startswith((".", "_")) for part in one.name.split("/"))
        and file_type(one.location, file_format) is not None
    ]
    if not found:
        raise DataError(f"'{place}' holds no {known} file")
    first = file_type(found[0].location, file_format)
    for one in found:
        other = file_type(one.location, file_format)
        if other != first:
            raise DataError(
                f"'{place}' holds files of several types: '{found[0].name}' is {first}, "
                f"'{one.name}' is {other}; put them into folders of their own"
            )
    return found


def found_names(listed: ListedFile, file_format: FileFormat) -> list[str]:
    """Names of the columns of a file and of its folders, such as country=FR.

    Raises:
        DataError: it cannot be read.
    """
    location = listed.location
    kind = file_type(location, file_format)
    assert kind is not None

    def names() -> list[str]:
        if kind in ("parquet", "arrow"):
            return list(columnar.open_fragment(location, kind).physical_schema.names)
        file = TextFile(location, kind, file_format)
        if kind == "jsonl":
            return json_lines.keys(file)
        found, _ = csv_files.read_header(file)
        return [name.strip() for name in found] if file_format.trim else found

    _check_content(location, kind, file_format.encoding)
    inside = _guarded(names, location, kind)
    return list(dict.fromkeys([*inside, *_hive_values(listed.name)]))


def open_file(
    listed: ListedFile, kinds: Mapping[str, ColumnKind], file_format: FileFormat
) -> SourceFile:
    """Open a file and find the types that its columns become.

    Raises:
        DataError: it cannot be read, lacks a column, or a column cannot be of its kind.
    """
    location = listed.location
    kind = file_type(location, file_format)
    assert kind is not None
    opening = _OPEN[kind]
    _check_content(location, kind, file_format.encoding)
    values = _hive_values(listed.name)
    partition = {name: value for name, value in values.items() if name in kinds}
    return _guarded(lambda: opening(listed, kinds, file_format, partition), location, kind)


def _check_content(location: Location, kind: FileType, encoding: str) -> None:
    """Refuse a local text file whose first bytes are not text of its encoding."""
    if location.local is None or kind not in ("csv", "tsv", "jsonl"):
        return
    if location.local.suffix.lower() in CODECS:
        return
    with open(location.local, "rb") as file:
        start = file.read(8)
    for mark, (content, ending) in _BINARY.items():
        if start.startswith(mark):
            raise DataError(
                f"'{location}' is named as {kind}, but holds {content}; rename it to end in "
                f"{ending}"
            )
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and "8" in encoding:
        raise DataError(f"'{location}' holds UTF-16 text: set format.encoding: utf-16")


def _guarded(read: Callable[[], R], location: Location, kind: FileType) -> R:
    try:
        return read() if location.local is not None else retry(read, f"'{location}'")
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        more = advice(error)
        raise DataError(
            f"'{location}' cannot be read as {kind}: {error}" + (f"; {more}" if more else "")
        ) from error


def common_schema(
    place: Location, files: Sequence[SourceFile], kinds: Mapping[str, ColumnKind]
) -> pa.Schema:
    """Types of the columns of all files.

    Raises:
        DataError: two files have types of a column that exclude each other.
    """
    types = dict(files[0].types)
    said = dict.fromkeys(types, files[0])
    for file in files[1:]:
        for name, other in file.types.items():
            before = types[name]
            joined = unified_type(kinds[name], before, other)
            if joined is None:
                raise DataError(
                    f"the files of '{place}' differ: column '{name}' is {_described(before)} in "
                    f"'{said[name].name}' and {_described(other)} in '{file.name}'; write all "
                    "files alike"
                )
            if pa.types.is_null(before):
                said[name] = file
            types[name] = joined
    return pa.schema(
        [
            (name, plain_type(kinds[name]) if pa.types.is_null(kind) else kind)
            for name, kind in types.items()
        ]
    )


def _described(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return f"a time in zone {kind.tz}" if kind.tz else "a time without a zone"
    return str(kind)


def _hive_values(name: str) -> dict[str, str | None]:
    """Values by the folders of a file, such as country=FR; all are text."""
    found: dict[str, str | None] = {}
    for part in PurePosixPath(name).parts[:-1]:
        key, mark, value = part.partition("=")
        if mark and key:
            found[unquote(key)] = None if value == _HIVE_NULL else unquote(value)
    return found


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
    _check_columns(listed.location, names, kinds, partition, file_format)
    headers = {name: raw[names.index(name)] for name in kinds if name in names}
    partition = {name: value for name, value in partition.items() if name not in headers}
    types: dict[str, pa.DataType] = {}
    for name, what in kinds.items():
        if what != "time":
            types[name] = plain_type(what)
            continue
        if name in headers:
            values = [] if rows is None else rows.column(headers[name])[:_TIMES_PEEKED].to_pylist()
            cells = [cell.decode("utf-8", "replace") for cell in values if cell is not None]
        else:
            cells = [partition[name]]
        types[name] = _time_type(cells, name, file, file_format)
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
        name: _time_type(found.get(name, [partition.get(name)]), name, file, file_format)
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
    _check_columns(listed.location, schema.names, kinds, partition, file_format)
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


_OPEN = {
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
        head = fragment.head(_TIMES_PEEKED, columns=[name]).column(name)
        cells = [
            cell.decode("utf-8", "replace") if isinstance(cell, bytes) else cell
            for cell in head.to_pylist()
        ]
    return _time_form(cells, name, str(location), file_format)


def _time_type(
    cells: Sequence[str | None], name: str, file: TextFile, file_format: FileFormat
) -> pa.DataType:
    form = _time_form(cells, name, f"{file.location}, near its first line", file_format)
    target = target_type("time", pa.string(), form, large=False)
    assert target is not None
    return target


def _time_form(
    cells: Sequence[str | None], name: str, where: str, file_format: FileFormat
) -> TimeForm | None:
    """Form of the first cell that is a time; None where there is no cell."""
    absent = {"", *(file_format.null_words if file_format.trim else ())}
    content = [cell for cell in cells if cell is not None and cell.strip() not in absent]
    for cell in content:
        form = time_form(cell, file_format)
        if form is not None:
            return form
    if content:
        raise DataError(
            f"{where}: column '{name}' is {content[0]!r}, expected a time such as "
            "2026-01-31T10:00:00+01:00 or a number; other forms are read with format.time, such "
            "as '%d.%m.%Y %H:%M'"
        )
    return None


def _check_columns(
    location: Location,
    names: Sequence[str],
    kinds: Mapping[str, ColumnKind],
    partition: Mapping[str, str | None],
    file_format: FileFormat,
) -> None:
    for name in kinds:
        if names.count(name) > 1:
            raise DataError(f"'{location}' has two columns '{name}'; rename one")
    missing = [name for name in kinds if name not in names and name not in partition]
    if not missing:
        return
    hint = ""
    stripped = [name.strip() for name in names]
    if all(name in stripped for name in missing):
        hint = ". Spaces stand around its names: set format.trim: true"
    elif len(names) == 1:
        for mark in (";", "\t", "|", ","):
            if mark in names[0] and mark != file_format.delimiter:
                hint = f". Its cells seem to be separated otherwise: set format.delimiter: {mark!r}"
                break
    raise DataError(
        f"'{location}' has no column {', '.join(repr(m) for m in missing)}; "
        f"it has {', '.join(names)}{hint}"
    )
