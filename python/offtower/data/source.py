"""Files as they come: opened, cut into units that can be read apart, checked unit by unit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray
from pyarrow import fs

from offtower.data.catalogue import Catalogue
from offtower.data.check import RowChecker
from offtower.data.location import AnyPath, Location
from offtower.data.log import TableOrigin
from offtower.data.moments import QuarantineEffect
from offtower.data.outcomes import OutcomeCounts
from offtower.data.parquet import FOOTER_THREADS
from offtower.data.parts import RowSource
from offtower.data.read_ahead import ParallelReadAhead
from offtower.data.round_tables import whole_round_tables
from offtower.data.schema import LogSchema
from offtower.data.stores import (
    ATTEMPTS,
    PAUSE_SECONDS,
    advice,
    first_line,
    is_transient,
    limit,
    request,
    retry,
)
from offtower.errors import DataError

logger = logging.getLogger("offtower.stores")

_FORMATS = {".csv": "csv", ".parquet": "parquet", ".arrow": "ipc", ".feather": "feather"}
_UNIT_ROWS = 262_144
_BATCH_ROWS = 131_072
"""pyarrow's own."""


def open_source(path: AnyPath) -> ds.Dataset:
    """A file, or a folder of files of one format.

    Raises:
        DataError: nothing is there, the format is unknown, or it cannot be read.
    """
    path = Location.of(path)
    kind_of_place = path.kind()
    if kind_of_place is None:
        raise DataError(f"there is no file or folder at '{path}'")
    sample = path
    if kind_of_place == "folder":
        files = [one.location for one in path.files() if one.location.suffix in _FORMATS]
        if not files:
            raise DataError(f"'{path}' holds no {', '.join(_FORMATS)} file")
        sample = files[0]
    kind = _FORMATS.get(sample.suffix)
    if kind is None:
        raise DataError(
            f"'{sample}' has an unknown ending '{sample.suffix}'; known: {', '.join(_FORMATS)}"
        )
    try:
        if path.local is not None:
            opened = ds.dataset(path.local, format=kind)
        else:
            opened = request(
                lambda: ds.dataset(path.path, format=kind, filesystem=path.filesystem), f"'{path}'"
            )
        _ = opened.schema.names  # Column names that are not UTF-8 fail here.
        return opened
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        more = advice(error)
        raise DataError(
            f"'{path}' cannot be read as {kind}: {error}" + (f"; {more}" if more else "")
        ) from error


def read_source(path: AnyPath) -> pa.Table:
    """All of a file or folder, as `open_source` opens it.

    Raises:
        DataError: as there, or a file is damaged.
    """
    path, source = Location.of(path), open_source(path)
    if path.local is not None:
        return source.to_table()
    units = Units(source, path, source.schema.names)
    batches = [batch for unit in range(len(units)) for batch in units.batches(unit)]
    return pa.Table.from_batches(batches, source.schema)


class Units:
    """A source in units: some row groups of a Parquet file; a whole file of another format, which
    cannot be cut. Batches are those of reading the source at once.

    Args:
        source: an opened source.
        place: its path, for messages.
        columns: those that are read.
        whole_files: do not cut Parquet files either, since rounds may cross their row groups.

    Raises:
        DataError: the source lacks one of the columns.
    """

    def __init__(
        self,
        source: ds.Dataset,
        place: AnyPath,
        columns: Sequence[str],
        *,
        whole_files: bool = False,
    ) -> None:
        place = Location.of(place)
        self.place, self.columns, self.schema = place, list(columns), source.schema
        missing = [name for name in columns if name not in source.schema.names]
        if missing:
            raise DataError(
                f"'{place}' has no column {', '.join(repr(m) for m in missing)}; "
                f"it has {', '.join(source.schema.names)}"
            )
        self.fragments: list[Any] = []
        self.known: list[int | None] = []
        """Rows of each unit, where the file says so."""
        self.first_rows: list[int] = []
        """Number in its file of each unit's first row."""
        fragments = list(source.get_fragments())
        here = place.local is not None
        found = (
            map(_row_groups, fragments)
            if here
            else ParallelReadAhead(
                _row_groups, fragments, FOOTER_THREADS, lambda f: f"'{f.path}'", limit()
            )
        )
        for fragment, groups in zip(fragments, found, strict=True):
            self._add(fragment, groups, None if whole_files else _UNIT_ROWS)

    def _add(
        self, fragment: Any, groups: list[tuple[int, int]] | None, unit_rows: int | None
    ) -> None:
        if groups is None:
            self.fragments.append(fragment)
            self.known.append(None)
            self.first_rows.append(0)
            return
        waiting: list[int] = []
        rows = first = 0
        for number, (group, count) in enumerate(groups):
            waiting.append(group)
            rows += count
            full = unit_rows is not None and rows >= unit_rows
            if full or number == len(groups) - 1:
                self.fragments.append(fragment.subset(row_group_ids=waiting))
                self.known.append(rows)
                self.first_rows.append(first)
                first += rows
                waiting, rows = [], 0

    def __len__(self) -> int:
        return len(self.fragments)

    def batches(
        self, unit: int, columns: Sequence[str] | None = None, most_rows: int = _BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """The unit's rows, in order, without empty batches, `most_rows` at a time.

        Raises:
            DataError: the file is damaged.
        """
        fragment, done = self.fragments[unit], 0
        wanted = self.columns if columns is None else list(columns)
        pause = PAUSE_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            at = 0
            try:
                batches = fragment.to_batches(
                    schema=self.schema, columns=wanted, batch_size=most_rows
                )
                if self.place.local is None:
                    batches = _waited_for(batches, f"'{fragment.path}'")
                for batch in batches:
                    new = batch.slice(min(max(done - at, 0), batch.num_rows))
                    at += batch.num_rows
                    if new.num_rows:
                        done = at
                        yield new
                return
            except (pa.ArrowInvalid, OSError) as error:
                here = self.place.local is not None
                # A damaged file raises OSError without a number; the operating system gives one.
                if here and isinstance(error, OSError) and error.errno is not None:
                    raise
                if here or attempt == ATTEMPTS or not is_transient(error):
                    more = "" if here else advice(error)
                    raise DataError(
                        f"'{fragment.path}' cannot be read after row {done} of its unit {unit}: "
                        f"{error}" + (f"; {more}" if more else "")
                    ) from error
                logger.warning(
                    "'%s' after row %d of its unit %d: %s; trying again in %.1f s",
                    *(fragment.path, done, unit, first_line(error), pause),
                )
            # Rows that were given already are read again, and passed over.
            time.sleep(pause)
            pause *= 2

    def located(self, unit: int) -> Iterator[tuple[pa.RecordBatch, TableOrigin]]:
        """`batches`, each with the file and the row in it where it begins."""
        first_row = self.first_rows[unit]
        file = self._file(self.fragments[unit].path)
        for batch in self.batches(unit):
            yield batch, TableOrigin(file, file_row=first_row)
            first_row += batch.num_rows

    def _file(self, path: str) -> str:
        """A fragment's file below the source, as the user knows it."""
        local = self.place.local
        root = self.place.path if local is None else str(local.resolve())
        path = path if local is None else str(Path(path).resolve())
        below = path.removeprefix(root).strip("/") if path.startswith(root) else ""
        return str(self.place / below if below else self.place)

    def count(self, unit: int) -> int:
        """Rows of a unit; a file that does not say so is read for it."""
        known = self.known[unit]
        if known is not None:
            return known
        return sum(batch.num_rows for batch in self.batches(unit, self.columns[:1]))

    def distinct(self, unit: int) -> tuple[int, pa.Array | None]:
        """Rows of a unit and the distinct values of its first column; None where all are null."""
        seen: pa.Array | None = None
        rows = 0
        for batch in self.batches(unit, self.columns[:1]):
            rows += batch.num_rows
            seen = joined_values(seen, batch.column(0))
        return rows, seen


def _waited_for(batches: Iterator[pa.RecordBatch], name: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches; a slow one is reported, and times out at the limit."""
    while True:
        batch = request(lambda: next(batches, None), name, attempts=1)
        if batch is None:
            return
        yield batch


def _row_groups(fragment: Any) -> list[tuple[int, int]] | None:
    """(number, rows) of each row group; None where the file has none, being no Parquet."""
    if not isinstance(fragment, ds.ParquetFileFragment):
        return None
    try:
        return retry(
            lambda: [(group.id, group.num_rows) for group in fragment.row_groups],
            f"'{fragment.path}'",
            attempts=1 if isinstance(fragment.filesystem, fs.LocalFileSystem) else None,
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"'{fragment.path}' cannot be read: {error}") from error


def joined_values(seen: pa.Array | None, more: pa.Array | None) -> pa.Array | None:
    """Distinct values of both."""
    if more is None:
        return seen
    values = pc.drop_null(pc.unique(more))
    return values if seen is None else pc.unique(pa.concat_arrays([seen, values]))


@dataclass
class CheckedUnits(RowSource):
    """The good rows of a source's units.

    Attributes:
        units: of the source.
        schema: what rows must keep, as the user gave it.
        learned: the same with the lengths that vectors were found to have, in unit `learned_in`;
            later units keep to it.
        catalogue: the items.
        first_rows: (u,) number of each unit's first row in the source.
        quarantine: folder for bad rows; None refuses them.
    """

    units: Units
    schema: LogSchema
    learned: LogSchema
    learned_in: int
    catalogue: Catalogue
    first_rows: NDArray[np.int64]
    quarantine: AnyPath | None
    counts: NDArray[np.int64]

    def checked(self, unit: int) -> Iterator[tuple[pa.Table, RowChecker]]:
        """Tables of good rows, each with the checker as it stands after it.

        Raises:
            BadRowsError: there is a bad row and no quarantine.
        """
        schema = self.learned if unit > self.learned_in else self.schema
        checker = RowChecker(schema, self.catalogue, quarantine=self.quarantine)
        first = int(self.first_rows[unit])
        for table, origin in whole_round_tables(self.units.located(unit), schema):
            yield checker.check(table, origin, first), checker
            first += table.num_rows

    def tables(self, unit: int) -> Iterator[pa.Table]:
        for table, _ in self.checked(unit):
            yield table

    def tally(self, unit: int) -> UnitTally:
        """Good and bad rows of a unit; the bad ones are in quarantine afterwards."""
        good, checker = 0, None
        for table, checker in self.checked(unit):  # noqa: B007 - the last one counts
            good += table.num_rows
        return UnitTally(good, 0) if checker is None else UnitTally.of(good, checker)


@dataclass(frozen=True)
class UnitTally:
    """Rows of a unit.

    Attributes:
        good: rows to write.
        bad: rows in quarantine.
        outcomes: rows left out as too young, and filled.
        effect: of the quarantine on the mean reward.
    """

    good: int
    bad: int
    outcomes: OutcomeCounts = field(default_factory=OutcomeCounts)
    effect: QuarantineEffect = field(default_factory=QuarantineEffect)

    @classmethod
    def of(cls, good: int, checker: RowChecker) -> UnitTally:
        """Return what a checker found, beside `good` rows."""
        return cls(good, checker.bad_rows, checker.outcomes, checker.quarantined)

    @property
    def rows(self) -> int:
        return self.good + self.bad + self.outcomes.young

    def __add__(self, other: UnitTally) -> UnitTally:
        return UnitTally(
            self.good + other.good,
            self.bad + other.bad,
            self.outcomes + other.outcomes,
            self.effect + other.effect,
        )
