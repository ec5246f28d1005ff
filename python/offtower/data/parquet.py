"""Parquet files, on this machine or in a store: their footers, and their rows by row group."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from offtower.data.location import Found, Location
from offtower.data.read_ahead import InOrder
from offtower.data.stores import ATTEMPTS, advice, first_line, limit, tried
from offtower.errors import DataError

FOOTER_THREADS = 32
"""Footers of a store that are read at the same time: each is little but its way."""
READ_THREADS = 8
READ_AHEAD_BYTES = 256 * 2**20
"""Row groups of a store that are read ahead, uncompressed; one that is larger comes by itself."""
_FOOTER_BYTES = 64 * 2**20
"""Footers of a store that are kept, so that a row group is one request and not two."""


@dataclass(frozen=True)
class Footer:
    """What a file says of itself: types of its columns, (rows, bytes) of each row group."""

    columns: pa.Schema
    row_groups: tuple[tuple[int, int], ...]
    size: int
    """Bytes of the file."""


def read_footer(file: Location) -> Footer:
    """The footer of one file.

    Raises:
        DataError: it is not Parquet, or cannot be read.
    """
    return next(read_footers([file]))


def read_footers(files: Sequence[Location]) -> Iterator[Footer]:
    """Footers, in order; those of a store by many threads.

    Raises:
        DataError: a file is not Parquet, or cannot be read.
    """
    if not files or files[0].local is not None:
        return map(_local_footer, files)
    return InOrder(_far_footer, files, FOOTER_THREADS, lambda file: f"'{file}'", limit())


def listed_footers(
    path: Location, found: Sequence[Found], manifest: Mapping[str, Any] | None
) -> list[Footer] | None:
    """The footers as the manifest of a folder lists them: one file is looked at, since files that
    offtower wrote together are alike. None where it lists none, or the folder has other files.

    Raises:
        DataError: a file that is listed is not there.
    """
    if manifest is None or not manifest.get("files"):
        return None
    there = {one.name: one for one in found}
    listed = {file["name"]: file for file in manifest["files"]}
    missing = [name for name in listed if name not in there]
    if missing:
        raise DataError(
            f"'{path / missing[0]}' is missing, which the folder's manifest lists "
            f"({len(missing)} of {len(listed)} files are). Put it back, or, to read what is left "
            "as a log of its own, remove '_offtower.json' and state data.log_schema"
        )
    if len(there) != len(listed) or any(listed[n]["bytes"] != f.size for n, f in there.items()):
        return None
    columns = read_footer(found[0].location).columns
    return [
        Footer(columns, tuple((rows, nbytes) for rows, nbytes in file["groups"]), file["bytes"])
        for file in (listed[name] for name in there)
    ]


def _local_footer(file: Location) -> Footer:
    assert file.local is not None
    try:
        with pq.ParquetFile(file.local) as opened:
            return _footer(opened, file.local.stat().st_size)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"'{file}' is not a readable Parquet file (truncated, or another format): {error}"
        ) from error


def _far_footer(file: Location) -> Footer:
    def read() -> Footer:
        with file.open() as source, pq.ParquetFile(source) as opened:
            return _footer(opened, source.size())

    try:
        return tried(read, f"'{file}'")
    except FileNotFoundError as error:
        raise DataError(_gone(file)) from error
    except (pa.ArrowInvalid, OSError) as error:
        more = advice(error) or "truncated, or another format"
        raise DataError(
            f"'{file}' is not a readable Parquet file ({first_line(error)}): {more}"
        ) from error


def _footer(opened: pq.ParquetFile, size: int) -> Footer:
    metadata = opened.metadata
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    found = tuple((group.num_rows, group.total_byte_size) for group in groups)
    return Footer(opened.schema_arrow, found, size)


class RowGroups:
    """Row groups of files, read one at a time or several ahead.

    Local files are opened for each row group: a log of thousands of files must not hold them all
    open. Those of a store are read by coalesced requests for the columns that are wanted, tried
    again where a read fails, and compared with what they were when they were first read.

    Args:
        files: of the log.
        places: of each row group: number of the file, number in the file.
        nbytes: of each row group, uncompressed.
        sizes: of the files, where they are known; a file of another size has changed.
    """

    def __init__(
        self,
        files: Sequence[Location],
        places: Sequence[tuple[int, int]],
        nbytes: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        self.files, self.places = list(files), list(places)
        self._nbytes, self._sizes = list(nbytes), list(sizes)
        self._known: dict[int, tuple[int, str]] = {}
        self._keep()

    @classmethod
    def of(cls, files: Sequence[Location], footers: Sequence[Footer]) -> RowGroups:
        """All row groups of files, in order."""
        groups = [(number, *group) for number, f in enumerate(footers) for group in _places(f)]
        places = [(number, group) for number, group, _ in groups]
        nbytes = [size for _, _, size in groups]
        return cls(files, places, nbytes, [footer.size for footer in footers])

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_footers", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._keep()

    def _keep(self) -> None:
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()

    def location(self, index: int) -> tuple[Location, int]:
        number, group = self.places[index]
        return self.files[number], group

    def read(self, index: int, columns: Sequence[str]) -> pa.Table:
        """The rows of one row group.

        Raises:
            DataError: they cannot be read, or the file is another by now.
        """
        if self.files[self.places[index][0]].local is not None:
            return self._read_here(index, columns)
        return next(self.read_many([index], columns))

    def read_many(self, indexes: Sequence[int], columns: Sequence[str]) -> Iterator[pa.Table]:
        """Row groups in the order of `indexes`. Those of a store are read ahead, by several
        threads, up to `READ_AHEAD_BYTES`."""
        if not indexes or self.files[self.places[indexes[0]][0]].local is not None:
            return map(self._read_here, indexes, repeat(columns))
        return InOrder(
            lambda index: self._read_there(index, columns),
            indexes,
            READ_THREADS,
            self._name,
            limit(),
            size=lambda index: self._nbytes[index],
            room=READ_AHEAD_BYTES,
        )

    def _name(self, index: int) -> str:
        file, group = self.location(index)
        return f"row group {group} of '{file}'"

    def _read_here(self, index: int, columns: Sequence[str]) -> pa.Table:
        file, group = self.location(index)
        try:
            with pq.ParquetFile(file.local) as opened:
                return opened.read_row_group(group, columns=list(columns))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{self._name(index)} cannot be read ({error}); "
                "the file is damaged or changed while it was read"
            ) from error

    def _read_there(self, index: int, columns: Sequence[str]) -> pa.Table:
        number, group = self.places[index]
        file = self.files[number]

        def read() -> pa.Table:
            with file.open() as source:
                self._compare(number, source)
                kept = self._footers.get(number)
                with pq.ParquetFile(source, metadata=kept, pre_buffer=True) as opened:
                    if kept is None:
                        self._remember(number, opened.metadata)
                    return opened.read_row_group(group, columns=list(columns))

        try:
            return tried(read, self._name(index))
        except FileNotFoundError as error:
            raise DataError(_gone(file)) from error
        except (pa.ArrowInvalid, OSError) as error:
            more = advice(error) or "the file is damaged, or the store does not give it"
            raise DataError(
                f"{self._name(index)} cannot be read, after up to {ATTEMPTS} attempts "
                f"({first_line(error)}); {more}"
            ) from error

    def _compare(self, number: int, source: pa.NativeFile) -> None:
        """Refuse a file that is no longer what it was: by its size, and by the tag of its content
        where the store gives one."""
        facts = {str(name).lower(): str(value) for name, value in source.metadata().items()}
        tag = facts.get("etag", "")
        now = (source.size(), tag)
        with self._lock:
            before = self._known.setdefault(number, (self._sizes[number], tag))
        if now != before:
            was = f"{before[0]:,} bytes {before[1]}".strip()
            raise DataError(
                f"'{self.files[number]}' has changed since it was opened (it had {was}, and has "
                f"{now[0]:,} bytes {now[1]}); a log must stay as it is while it is read: write new "
                "rows to a new folder, and start again"
            )

    def _remember(self, number: int, metadata: pq.FileMetaData) -> None:
        with self._lock:
            self._footers[number] = metadata
            held = sum(one.serialized_size for one in self._footers.values())
            while held > _FOOTER_BYTES and len(self._footers) > 1:
                held -= self._footers.popitem(last=False)[1].serialized_size


def _places(footer: Footer) -> list[tuple[int, int]]:
    """(number, bytes) of each row group."""
    return [(number, nbytes) for number, (_, nbytes) in enumerate(footer.row_groups)]


def _gone(file: Location) -> str:
    return (
        f"'{file}' was there when the folder was listed, and is gone: it was removed or replaced "
        "meanwhile. A log must stay as it is while it is read; start again on one that stays"
    )
