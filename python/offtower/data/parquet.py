"""Reading of Parquet files on this machine and in stores: footers and row groups."""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from offtower.data.location import AnyPath, ListedFile, Location
from offtower.data.manifest import FILE as MANIFEST
from offtower.data.manifest import find_parquet_files, read_manifest
from offtower.data.parquet_checksums import (
    UNREADABLE,
    Checksums,
    open_parquet,
    read_footer_bytes,
)
from offtower.data.read_ahead import ParallelReadAhead
from offtower.data.stores import ATTEMPTS, advice, first_line, limit, retry
from offtower.errors import DataError

FOOTER_THREADS = 32
"""Footers of a store that are read at the same time."""
READ_THREADS = 8
READ_AHEAD_BYTES = 256 * 2**20
"""Bytes of uncompressed row groups of a store that are read ahead; a larger one is read alone."""
_BLOCK_BYTES = 8 * 2**20
_FOOTER_BYTES = 64 * 2**20
"""Footers that are kept, so that a row group of a store is one request and not two."""


@dataclass(frozen=True)
class Footer:
    """Facts about a file.

    Attributes:
        columns: their types.
        row_groups: (rows, bytes) of each.
        size: bytes of the file.
        digest: sha256 of the file, or of its footer where only that was read.
        tail: length and CRC-32 of the footer with the 8 bytes behind it.
        checksums: where a manifest has them.
    """

    columns: pa.Schema
    row_groups: tuple[tuple[int, int], ...]
    size: int
    digest: str
    tail: tuple[int, int]
    checksums: Checksums | None = None

    @classmethod
    def of_written(cls, path: Path) -> Footer:
        """Facts and checksums of a file that was just written here."""
        checksums = Checksums.of(path)
        read = _footer(Location.of(path))
        return replace(read, digest=checksums.sha256, checksums=checksums)

    def to_dict(self, name: str) -> dict[str, Any]:
        """A file of that name as a manifest lists it."""
        listed = {"name": name, "bytes": self.size, "groups": self.row_groups}
        return listed if self.checksums is None else {**listed, **self.checksums.to_dict()}

    @classmethod
    def from_dict(cls, listed: Mapping[str, Any], columns: pa.Schema) -> Footer:
        """What `to_dict` gave, of a file with these columns."""
        groups = tuple((rows, nbytes) for rows, nbytes in listed["groups"])
        checksums = Checksums.from_dict(listed)
        tail = checksums.footer_bytes, checksums.footer
        return cls(columns, groups, listed["bytes"], checksums.sha256, tail, checksums)


def read_footer(file: Location) -> Footer:
    """Read the footer of a file.

    Raises:
        DataError: it is not Parquet, or cannot be read.
    """
    return next(read_footers([file]))


def read_footers(files: Sequence[Location]) -> Iterator[Footer]:
    """Read footers, in order; those of a store with many threads.

    Raises:
        DataError: a file is not Parquet, or cannot be read.
    """
    if not files or files[0].local is not None:
        return map(_footer, files)
    return ParallelReadAhead(_footer, files, FOOTER_THREADS, lambda file: f"'{file}'", limit())


def listed_footers(
    path: Location,
    found: Sequence[ListedFile],
    manifest: Mapping[str, Any] | None,
    copies: Sequence[Location] | None = None,
) -> list[Footer]:
    """Return the footers listed in a folder's manifest; those of other files are read.

    Sizes are compared, and the footers of files on this machine verified. In a store one footer is
    read, since files that offtower wrote together have the same columns; the others are verified
    with their first row group.

    Args:
        path: the folder.
        found: its files.
        manifest: of the folder; None where it has none.
        copies: where to read the files instead.

    Raises:
        DataError: a file that is listed is missing, damaged or another by now.
    """
    files = [one.location for one in found] if copies is None else list(copies)
    if manifest is None or not manifest.get("files"):
        return list(read_footers(files))
    there = {one.name: (one, file) for one, file in zip(found, files, strict=True)}
    listed = {file["name"]: file for file in manifest["files"]}
    missing = [name for name in listed if name not in there]
    if missing:
        raise DataError(
            f"'{path / missing[0]}' is missing, which the folder's manifest lists "
            f"({len(missing)} of {len(listed)} files are). Put it back, or, to read what is left "
            "as a log of its own, remove '_offtower.json' and state data.log_schema"
        )
    columns: pa.Schema | None = None
    footers: dict[str, Footer] = {}
    for name, facts in listed.items():
        one, file = there[name]
        if one.size != facts["bytes"]:
            raise DataError(
                f"'{one.location}' has {one.size:,} bytes, and {facts['bytes']:,} in the manifest: "
                "it was truncated or written again. Restore it from a copy; if you replaced it on "
                f"purpose, remove '{MANIFEST}' and state data.log_schema"
            )
        if columns is None or file.local is not None:
            columns = _verified_columns(file, Checksums.from_dict(facts), one.location)
        footers[name] = Footer.from_dict(facts, columns)
    others = [name for name in there if name not in footers]
    read = read_footers([there[name][1] for name in others])
    footers |= dict(zip(others, read, strict=True))
    return [footers[one.name] for one in found]


def _verified_columns(file: Location, checksums: Checksums, name: Location) -> pa.Schema:
    def read() -> pa.Schema:
        with open_source(file) as source:
            return checksums.read_footer(source).schema.to_arrow_schema()

    try:
        return read() if file.local is not None else retry(read, f"'{name}'")
    except FileNotFoundError as error:
        raise DataError(_gone(name)) from error
    except UNREADABLE as error:
        raise DataError(_damaged(f"'{name}'", error)) from error


def open_source(file: Location) -> pa.NativeFile:
    """Open a file for reading at any place."""
    return file.open() if file.local is None else pa.OSFile(str(file.local))


def verify_files(path: AnyPath, what: str) -> int:
    """Compare the sha256 of all files of a folder with its manifest.

    Args:
        what: "log" or "catalogue", for messages.

    Returns:
        The number of files.

    Raises:
        DataError: a file is missing, damaged or not listed, or the folder has no manifest.
    """
    folder = Location.of(path)
    listed = {file["name"]: file for file in (read_manifest(folder) or {}).get("files", ())}
    if not listed:
        raise DataError(
            f"the {what} at '{folder}' has no manifest with checksums ('{MANIFEST}'), so its files "
            "cannot be verified; ingest it first"
        )
    found = find_parquet_files(folder, what)
    listed_footers(folder, found, {"files": list(listed.values())})
    for one in found:
        if one.name not in listed:
            raise DataError(f"'{one.location}' is not listed in '{MANIFEST}'; remove it")
        if _sha256(one.location) != listed[one.name]["sha256"]:
            raise DataError(
                f"'{one.location}' is damaged: its sha256 is not the one recorded when it was "
                "written; restore it from a copy"
            )
    return len(found)


def _sha256(file: Location) -> str:
    def read() -> str:
        digest = hashlib.sha256()
        with open_source(file) as source:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    try:
        return read() if file.local is not None else retry(read, f"'{file}'")
    except UNREADABLE as error:
        raise DataError(_damaged(f"'{file}'", error)) from error


def read_row_group(
    file: Location, footer: Footer, group: int, columns: Sequence[str], name: str
) -> pa.Table:
    """Read a row group of a file on this machine, verified if its checksums are known.

    Args:
        name: of the file, for messages.

    Raises:
        DataError: they cannot be read, or are damaged.
    """
    try:
        with open_source(file) as source:
            if footer.checksums is not None:
                metadata = footer.checksums.read_footer(source)
                return footer.checksums.read_row_group(source, metadata, group, columns)
            with open_parquet(source) as opened:
                return opened.read_row_group(group, columns=list(columns))
    except UNREADABLE as error:
        raise DataError(_damaged(f"row group {group} of '{name}'", error)) from error


def _damaged(what: str, error: BaseException) -> str:
    more = advice(error) or "the file is damaged, or changed while it was read"
    return f"{what} cannot be read ({first_line(error)}); {more}"


def _footer(file: Location) -> Footer:
    """Read the footer of a file without checksums."""

    def read() -> Footer:
        with open_source(file) as source:
            metadata, tail = read_footer_bytes(source)
            groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
            found = tuple((group.num_rows, group.total_byte_size) for group in groups)
            columns, digest = metadata.schema.to_arrow_schema(), hashlib.sha256(tail).hexdigest()
            return Footer(columns, found, source.size(), digest, (len(tail), zlib.crc32(tail)))

    try:
        return read() if file.local is not None else retry(read, f"'{file}'")
    except FileNotFoundError as error:
        raise DataError(_gone(file)) from error
    except UNREADABLE as error:
        more = advice(error) or "truncated, or another format"
        raise DataError(
            f"'{file}' is not a readable Parquet file ({first_line(error)}): {more}"
        ) from error


class RowGroups:
    """Reads row groups of files, verified if the footers have checksums.

    Local files are opened for each row group, since a log may have thousands. Files of a store are
    read by coalesced requests for the columns, retried on failure, and refused if they changed.

    Args:
        files: of the log.
        footers: of the files.
    """

    def __init__(self, files: Sequence[Location], footers: Sequence[Footer]) -> None:
        self.files, self._footers = list(files), list(footers)
        self.places = [
            (number, group)
            for number, footer in enumerate(footers)
            for group in range(len(footer.row_groups))
        ]
        self._known: dict[int, tuple[int, str]] = {}
        self._keep()

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_metadata", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep()

    def _keep(self) -> None:
        self._metadata: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()

    def location(self, index: int) -> tuple[Location, int]:
        number, group = self.places[index]
        return self.files[number], group

    def read(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Read a row group.

        Raises:
            DataError: they cannot be read or are damaged, or the file is another by now.
        """
        if self.files[self.places[index][0]].local is not None:
            return self._read_here(index, columns)
        return next(self.read_many([index], columns))

    def read_many(self, indexes: Sequence[int], columns: Sequence[str]) -> Iterator[pa.Table]:
        """Read row groups in order; those of a store ahead by threads, up to `READ_AHEAD_BYTES`."""
        if not indexes or self.files[self.places[indexes[0]][0]].local is not None:
            return map(self._read_here, indexes, repeat(columns))
        return ParallelReadAhead(
            lambda index: self._read_there(index, columns),
            indexes,
            READ_THREADS,
            self._name,
            limit(),
            size=self._bytes,
            room=READ_AHEAD_BYTES,
        )

    def _bytes(self, index: int) -> int:
        number, group = self.places[index]
        return self._footers[number].row_groups[group][1]

    def _name(self, index: int) -> str:
        file, group = self.location(index)
        return f"row group {group} of '{file}'"

    def _read_here(self, index: int, columns: Sequence[str]) -> pa.Table:
        (file, group), footer = self.location(index), self._footers[self.places[index][0]]
        return read_row_group(file, footer, group, columns, str(file))

    def _read_there(self, index: int, columns: Sequence[str]) -> pa.Table:
        try:
            return retry(lambda: self._read_once(index, columns), self._name(index))
        except FileNotFoundError as error:
            raise DataError(_gone(self.location(index)[0])) from error
        except UNREADABLE as error:
            more = advice(error) or "the file is damaged, or the store does not give it"
            raise DataError(
                f"{self._name(index)} cannot be read, after up to {ATTEMPTS} attempts "
                f"({first_line(error)}); {more}"
            ) from error

    def _read_once(self, index: int, columns: Sequence[str]) -> pa.Table:
        number, group = self.places[index]
        checksums = self._footers[number].checksums
        with self.files[number].open() as source:
            self._compare(number, source)
            metadata = self._metadata.get(number)
            if checksums is not None:
                if metadata is None:
                    metadata = self._remember(number, checksums.read_footer(source))
                return checksums.read_row_group(source, metadata, group, columns)
            with open_parquet(source, metadata=metadata, pre_buffer=True) as opened:
                if metadata is None:
                    self._remember(number, opened.metadata)
                return opened.read_row_group(group, columns=list(columns))

    def _compare(self, number: int, source: pa.NativeFile) -> None:
        """Refuse a file whose size, or entity tag in the store, has changed."""
        facts = {str(name).lower(): str(value) for name, value in source.metadata().items()}
        tag = facts.get("etag", "")
        now = (source.size(), tag)
        with self._lock:
            before = self._known.setdefault(number, (self._footers[number].size, tag))
        if now != before:
            was = f"{before[0]:,} bytes {before[1]}".strip()
            raise DataError(
                f"'{self.files[number]}' has changed since it was opened (it had {was}, and has "
                f"{now[0]:,} bytes {now[1]}); a log must stay as it is while it is read: write new "
                "rows to a new folder, and start again"
            )

    def _remember(self, number: int, metadata: pq.FileMetaData) -> pq.FileMetaData:
        with self._lock:
            self._metadata[number] = metadata
            held = sum(one.serialized_size for one in self._metadata.values())
            while held > _FOOTER_BYTES and len(self._metadata) > 1:
                held -= self._metadata.popitem(last=False)[1].serialized_size
        return metadata


def _gone(file: Location) -> str:
    return (
        f"'{file}' was there when the folder was listed, and is gone: it was removed or replaced "
        "meanwhile. A log must stay as it is while it is read; start again on one that stays"
    )
