"""Sources of rows: files opened with the kinds of their columns, cut into units and checked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.check import RowChecker
from offtower.data.columns import is_list, is_text
from offtower.data.formats.conversion import Conversion
from offtower.data.formats.files import common_schema, find_files, found_names, open_file
from offtower.data.formats.kinds import ColumnKind
from offtower.data.formats.options import FileFormat
from offtower.data.formats.source_file import RawBatch, SourceFile
from offtower.data.location import AnyPath, ListedFile, Location
from offtower.data.log import TableOrigin
from offtower.data.moments import QuarantineEffect
from offtower.data.outcomes import OutcomeCounts
from offtower.data.parquet import FOOTER_THREADS
from offtower.data.parquet_checksums import UNREADABLE
from offtower.data.parts import RowSource
from offtower.data.read_ahead import ParallelReadAhead
from offtower.data.round_tables import whole_round_tables
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.data.stores import (
    ATTEMPTS,
    PAUSE_SECONDS,
    advice,
    first_line,
    is_transient,
    limit,
    request,
)
from offtower.errors import DataError

logger = logging.getLogger("offtower.stores")

_UNIT_ROWS = 262_144
_BATCH_ROWS = 131_072
"""pyarrow's own."""


def open_source(
    path: AnyPath,
    kinds: Mapping[str, ColumnKind],
    file_format: FileFormat | None = None,
    *,
    further: bool = False,
    whole_files: bool = False,
) -> Source:
    """Open a file, or a folder of files of one type, which may be partitioned as Hive does it.

    Args:
        path: CSV, TSV or JSON Lines (also compressed), Parquet or Arrow.
        kinds: the columns to read and their kinds (`formats.kinds`).
        file_format: how text files write values; by default as RFC 4180 and ISO 8601 say.
        further: also read the file's other columns, those of text files as text.
        whole_files: do not cut Parquet files either, since rounds may cross their row groups.

    Raises:
        DataError: nothing is there, a file is of an unknown type or cannot be read, lacks a column
            or holds one that cannot be of its kind, or files differ in the types of a column.
    """
    place, written = Location.of(path), file_format or FileFormat()
    listed = find_files(place, written)
    if further:
        kinds = {**kinds, **{n: "any" for n in found_names(listed[0], written) if n not in kinds}}
    return Source(place, listed, kinds, written, None if whole_files else _UNIT_ROWS)


def column_names(path: AnyPath, file_format: FileFormat | None = None) -> list[str]:
    """Names of the columns of a file, or of a folder's first file.

    Raises:
        DataError: see `open_source`.
    """
    written = file_format or FileFormat()
    return found_names(find_files(Location.of(path), written)[0], written)


def read_source(
    path: AnyPath, kinds: Mapping[str, ColumnKind], file_format: FileFormat | None = None
) -> pa.Table:
    """All of a file or folder, as `open_source` opens it.

    Raises:
        DataError: as there, or a cell is bad, or a file is damaged.
    """
    source = open_source(path, kinds, file_format)
    batches = [batch for unit in range(len(source)) for batch in source.batches(unit)]
    return pa.Table.from_batches(batches, source.schema)


class Source:
    """Files in units: some row groups of a Parquet file; a whole file of another type, which cannot
    be cut.

    Attributes:
        place: path of the file or folder.
        schema: types of the columns.
        known: rows of each unit, where the file says so.
        first_rows: number in its file of each unit's first row.
    """

    def __init__(
        self,
        place: Location,
        listed: Sequence[ListedFile],
        kinds: Mapping[str, ColumnKind],
        file_format: FileFormat,
        unit_rows: int | None,
    ) -> None:
        self.place, self.kinds = place, dict(kinds)
        opening = partial(open_file, kinds=self.kinds, file_format=file_format)
        if place.local is not None:
            files = list(map(opening, listed))
        else:
            files = list(
                ParallelReadAhead(
                    opening, listed, FOOTER_THREADS, lambda one: f"'{one.location}'", limit()
                )
            )
        self.schema = common_schema(place, files, self.kinds)
        self._convert = Conversion(self.kinds, self.schema, file_format)
        self.known: list[int | None] = []
        self.first_rows: list[int] = []
        self._units: list[SourceFile] = []
        for file in files:
            self._add(file, unit_rows)

    def _add(self, file: SourceFile, unit_rows: int | None) -> None:
        if file.row_groups is None:
            self._units.append(file)
            self.known.append(None)
            self.first_rows.append(0)
            return
        waiting: list[int] = []
        rows = first = 0
        for number, (group, count) in enumerate(file.row_groups):
            waiting.append(group)
            rows += count
            full = unit_rows is not None and rows >= unit_rows
            if full or number == len(file.row_groups) - 1:
                self._units.append(file.subset(waiting))
                self.known.append(rows)
                self.first_rows.append(first)
                first += rows
                waiting, rows = [], 0

    def __len__(self) -> int:
        return len(self._units)

    def like_catalogue(
        self, schema: LogSchema, items: pa.Table, catalogue: CatalogueSchema
    ) -> Source:
        """The source of a log with its ids as text or integers, as the catalogue has them; what has
        no equal there, such as 007 among integers, becomes a bad cell."""
        named = {schema.action: catalogue.item_id}
        if schema.eligible is not None:
            named |= dict.fromkeys(schema.eligible.lists, catalogue.item_id)
            named |= {form.context: form.item for form in schema.eligible.attribute}
        named |= {spec.source: catalogue.item_id for spec in schema.context if spec.history}
        source = self
        for column, other in named.items():
            kind = items.schema.field(other).type
            source = source.with_ids(column, is_text(kind.value_type if is_list(kind) else kind))
        return source

    def with_ids(self, column: str, text: bool) -> Source:
        """The source with a column of ids as text or as integers; see `like_catalogue`."""
        source = copy(self)
        source._convert = self._convert.with_ids(column, "text" if text else "int64")
        source.schema = source._convert.schema
        return source

    def batches(
        self, unit: int, columns: Sequence[str] | None = None, most_rows: int = _BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """The unit's rows, in order, without empty batches, at most `most_rows` at a time.

        Raises:
            DataError: the file is damaged, or a cell is bad.
        """
        for batch, origin in self.located(unit, columns, most_rows):
            for bad in origin.bad_cells_of(batch.num_rows):
                raise DataError(f"{origin.place(int(bad.rows[0]))}: {bad.describe()}")
            yield batch

    def located(
        self, unit: int, columns: Sequence[str] | None = None, most_rows: int = _BATCH_ROWS
    ) -> Iterator[tuple[pa.RecordBatch, TableOrigin]]:
        """The same, each with the file, the row in it where it begins, and its bad cells.

        Raises:
            DataError: the file is damaged.
        """
        file = self._units[unit]
        convert = self._convert
        if columns is not None:
            chosen = pa.schema([self.schema.field(name) for name in columns])
            convert = replace(convert, schema=chosen)
        name = str(self.place / file.name if file.name else self.place)
        row = self.first_rows[unit]
        for raw, marked in self._raw(unit, convert.schema.names, most_rows):
            batch, bad = convert(raw)
            cells = tuple(replace(one, rows=one.rows + row) for one in (*marked, *bad))
            yield batch, TableOrigin(name, None, row, file.text, cells)
            row += batch.num_rows

    def _raw(self, unit: int, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        file, done = self._units[unit], 0
        pause = PAUSE_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            at = 0
            try:
                batches = file.batches(names, most_rows)
                if self.place.local is None:
                    batches = _waited_for(batches, f"'{file.location}'")
                for batch, bad in batches:
                    known = min(max(done - at, 0), batch.num_rows)
                    at += batch.num_rows
                    for first in range(known, batch.num_rows, most_rows):
                        part = slice(first, min(first + most_rows, batch.num_rows))
                        done += part.stop - part.start
                        yield (
                            batch.slice(part.start, part.stop - part.start),
                            tuple(one.between(part.start, part.stop) for one in bad),
                        )
                return
            except UNREADABLE as error:
                here = self.place.local is not None
                # A damaged file raises OSError without a number; the operating system gives one.
                if here and isinstance(error, OSError) and error.errno is not None:
                    raise
                if here or attempt == ATTEMPTS or not is_transient(error):
                    more = "" if here else advice(error)
                    raise DataError(
                        f"'{file.location}' cannot be read after row {done} of its unit {unit}: "
                        f"{error}" + (f"; {more}" if more else "")
                    ) from error
                logger.warning(
                    "'%s' after row %d of its unit %d: %s; trying again in %.1f s",
                    *(file.location, done, unit, first_line(error), pause),
                )
            # Rows that were given already are read again, and passed over.
            time.sleep(pause)
            pause *= 2

    def count(self, unit: int) -> int:
        """Rows of a unit; a file that does not say so is read for it."""
        known = self.known[unit]
        if known is not None:
            return known
        return sum(batch.num_rows for batch, _ in self.located(unit, self.schema.names[:1]))

    def distinct(self, unit: int, column: str) -> tuple[int, pa.Array | None]:
        """Rows of a unit and the distinct values of a column; None where all are null."""
        seen: pa.Array | None = None
        rows = 0
        for batch, _ in self.located(unit, [column]):
            rows += batch.num_rows
            seen = joined_values(seen, batch.column(0))
        return rows, seen


def _waited_for(batches: Iterator[RawBatch], name: str) -> Iterator[RawBatch]:
    """Yield the batches; a slow one is reported, and times out at the limit."""
    while True:
        batch = request(lambda: next(batches, None), name, attempts=1)
        if batch is None:
            return
        yield batch


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

    units: Source
    schema: LogSchema
    learned: LogSchema
    learned_in: int
    catalogue: Catalogue
    first_rows: NDArray[np.int64]
    quarantine: AnyPath | None
    counts: NDArray[np.int64]

    @classmethod
    def uncounted(
        cls, units: Source, schema: LogSchema, catalogue: Catalogue, quarantine: AnyPath | None
    ) -> CheckedUnits:
        """Units whose rows are not counted yet, and whose schema has learned nothing."""
        none = np.zeros(len(units), dtype=np.int64)
        return cls(units, schema, schema, len(units), catalogue, none, quarantine, none)

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
