"""Files of a source: found, opened, and the types of their columns together."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa

from offtower.data.formats import columnar, csv_files, json_lines
from offtower.data.formats.kinds import ColumnKind
from offtower.data.formats.open_files import OPENERS
from offtower.data.formats.options import CODECS, ENDINGS, FileFormat, FileType
from offtower.data.formats.source_file import SourceFile
from offtower.data.formats.streams import TextFile, file_type
from offtower.data.formats.types import plain_type, unified_type
from offtower.data.location import ListedFile, Location
from offtower.data.parquet_checksums import UNREADABLE
from offtower.data.stores import advice, retry
from offtower.errors import DataError

R = TypeVar("R")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_BINARY = {
    b"\x1f\x8b": ("gzip data", ".csv.gz, or .jsonl.gz"),
    b"\x28\xb5\x2f\xfd": ("zstd data", ".csv.zst, or .jsonl.zst"),
    b"PAR1\x15": ("Parquet", ".parquet"),
    b"ARROW1\x00": ("Arrow data", ".arrow"),
}
"""What a file holds by its first bytes, and the ending that reads it."""


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
    opening = OPENERS[kind]
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
    except UNREADABLE as error:
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
