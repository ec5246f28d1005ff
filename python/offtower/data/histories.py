"""Histories: ordered lists of items of the catalogue, with what is known of each event."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import (
    CategoryType,
    Column,
    as_array,
    as_float_array,
    category_type,
    category_values,
    is_category,
    is_list,
    is_number,
    is_text,
    list_parts,
    timestamps,
)
from offtower.data.schema import FeatureSpec
from offtower.data.vectors import Mask
from offtower.errors import DataError

AGE, EVENT, DWELL = "age", "event", "dwell"
"""Columns of an encoded history: float64 time from the event to the row, in seconds or in the unit
of numeric timestamps; int64 index of the event's type; float32 standardized number."""

_MICROSECONDS = 1e6


@dataclass(frozen=True)
class HistoryBasis:
    """What the encoding of histories needs besides the rows.

    Attributes:
        item_ids: of the catalogue.
        timestamp: the log's column of times; None where it has none.
    """

    item_ids: pa.Array
    timestamp: str | None = None

    @property
    def vocabulary(self) -> pa.Array:
        """The ids in the order of a category's vocabulary, so that a history and the items' own ids
        index the same table."""
        ids = category_values(self.item_ids)
        return ids.take(pc.sort_indices(ids))

    @property
    def type(self) -> CategoryType:
        found = category_type(self.item_ids.type)
        assert found is not None, "the catalogue checks the type of its ids"
        return found


@dataclass(frozen=True)
class Events:
    """The events of n histories, k in all; row i has those from offsets[i] to offsets[i + 1].

    Attributes:
        times: (k,) float64, microseconds or in the unit of numeric timestamps; None without times.
        row_times: (n,) of the rows.
        unit: of the times, relative to those of `AGE`.
    """

    items: pa.Array
    offsets: NDArray[np.int64]
    times: NDArray[np.float64] | None
    row_times: NDArray[np.float64] | None
    unit: float
    types: pa.Array | None
    dwell: NDArray[np.float64] | None

    @property
    def row(self) -> NDArray[np.int64]:
        """(k,) row of each event."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def unordered(self) -> Mask:
        """(n,) rows whose times fall."""
        found = np.zeros(len(self.offsets) - 1, dtype=bool)
        if self.times is not None and len(self.times) > 1:
            row = self.row
            falls = (np.diff(self.times) < 0) & (row[1:] == row[:-1])
            found[row[1:][falls]] = True
        return found

    def newest(self, most: int) -> Events:
        """The last `most` events of each row, in the order of their times."""
        row = self.row
        chosen: NDArray[np.int64] | None = None
        if self.times is not None and self.unordered().any():
            chosen = np.lexsort((self.times, row))
        if (np.diff(self.offsets) > most).any():
            # Events of a row stay together, so places count within it.
            kept = self.offsets[1:][row] - np.arange(len(row)) <= most
            chosen = np.flatnonzero(kept) if chosen is None else chosen[kept]
        if chosen is None:
            return self
        counts = np.minimum(np.diff(self.offsets), most)
        return Events(
            self.items.take(pa.array(chosen)),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            None if self.times is None else self.times[chosen],
            self.row_times,
            self.unit,
            None if self.types is None else self.types.take(pa.array(chosen)),
            None if self.dwell is None else self.dwell[chosen],
        )

    def age(self) -> NDArray[np.float64]:
        """(k,) time from each event to its row, at least 0."""
        assert self.times is not None and self.row_times is not None
        return np.maximum((self.row_times[self.row] - self.times) / self.unit, 0.0)


def read_events(spec: FeatureSpec, items: Column, table: pa.Table, timestamp: str | None) -> Events:
    """Read the events of a table's histories.

    Args:
        items: the column `spec.source`, of lists.
        timestamp: column of the rows' times.

    Raises:
        DataError: a column is missing or of another type, or lists of one row differ in length.
    """
    ids, offsets = list_parts(items)
    parallel: dict[str, pa.Array] = {}
    for name in spec.sources[1:]:
        values, found = list_parts(_lists(spec, name, table))
        different = np.flatnonzero(found != offsets)
        if different.size:
            row = int(different[0]) - 1
            raise DataError(
                f"feature '{spec.name}': row {row} has {int(np.diff(found)[row])} values in column "
                f"'{name}' and {int(np.diff(offsets)[row])} events; write one for each event"
            )
        parallel[name] = values
    times = row_times = None
    unit = 1.0
    if spec.times is not None:
        assert timestamp is not None, "the schema checks it"
        if timestamp not in table.column_names:
            raise DataError(
                f"no column '{timestamp}': feature '{spec.name}' has the times of its events, and "
                "needs that of the row"
            )
        times, of_events = _numbers(parallel[spec.times])
        row_times, of_rows = _numbers(as_array(table.column(timestamp)))
        if len(times) and of_events != of_rows:
            raise DataError(
                f"feature '{spec.name}': '{spec.times}' holds {_kind(of_events)} and "
                f"'{timestamp}' holds {_kind(of_rows)}; write both alike"
            )
        unit = _MICROSECONDS if of_rows else 1.0
    return Events(
        ids,
        offsets,
        times,
        row_times,
        unit,
        None if spec.events is None else parallel[spec.events],
        None if spec.dwell is None else as_float_array(parallel[spec.dwell]),
    )


def history_faults(
    table: pa.Table, spec: FeatureSpec, timestamp: str | None
) -> Iterator[tuple[str, str, str, Mask]]:
    """Find rows with an unusable history: (column, problem, expected, (n,) mask) of each fault.

    Null and empty histories, unknown items, unordered events and more of them than are read are no
    faults.

    Raises:
        DataError: a column is missing or has a wrong type.
    """
    offsets = list_parts(table.column(spec.source))[1]
    bad = np.zeros(table.num_rows, dtype=bool)
    for name in spec.sources[1:]:
        found = list_parts(_lists(spec, name, table))[1]
        other = np.diff(found) != np.diff(offsets)
        if other.any():
            yield name, "of another length", f"a value for each event of '{spec.source}'", other
            bad |= other
    good = table if not bad.any() else table.filter(pa.array(~bad))
    events = read_events(spec, good.column(spec.source), good, timestamp)

    def rows(wrong: Mask) -> Mask:
        found = np.zeros(table.num_rows, dtype=bool)
        found[np.flatnonzero(~bad)[np.unique(events.row[wrong])]] = True
        return found

    if events.times is not None and events.row_times is not None and spec.times is not None:
        missing = ~np.isfinite(events.times)
        if missing.any():
            yield spec.times, "with a null", "a time for each event", rows(missing)
        late = events.times >= events.row_times[events.row]
        if late.any():
            expected = (
                f"events before the row's '{timestamp}': an event at that time or later is the "
                "row itself or its future, which no policy knows when it serves"
            )
            yield spec.times, "not before the row", expected, rows(late)
    if events.dwell is not None and spec.dwell is not None:
        missing = ~np.isfinite(events.dwell)
        if missing.any():
            yield spec.dwell, "not finite", "a finite number for each event", rows(missing)


def without_late_events(
    table: pa.Table, specs: Iterable[FeatureSpec], timestamp: str | None
) -> tuple[pa.Table, int]:
    """Drop the events at a row's time or later from all columns of its histories with times.

    Ingestion refuses such events (`history_faults`), so that no policy was trained with them. A
    request that holds some is read, and logged, without them.

    Returns:
        The table, and the number of dropped events.

    Raises:
        DataError: see `read_events`.
    """
    dropped = 0
    for spec in specs:
        if not spec.history or spec.times is None:
            continue
        events = read_events(spec, table.column(spec.source), table, timestamp)
        assert events.times is not None and events.row_times is not None, "the history has times"
        late = events.times >= events.row_times[events.row]
        if not late.any():
            continue
        dropped += int(np.count_nonzero(late))
        counts = np.bincount(events.row[~late], minlength=table.num_rows)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        kept = pa.array(~late)
        for name in spec.sources:
            column = as_array(table.column(name))
            lists = pa.ListArray.from_arrays(offsets, list_parts(column)[0].filter(kept))
            if pa.types.is_large_list(column.type):  # The files of a log have one type.
                lists = pc.cast(lists, column.type)
            table = table.set_column(table.column_names.index(name), name, lists)
    return table, dropped


def _lists(spec: FeatureSpec, name: str, table: pa.Table) -> pa.Array:
    if name not in table.column_names:
        raise DataError(f"no column '{name}', which feature '{spec.name}' names")
    column = as_array(table.column(name))
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.list_(pa.int64()))
    if not is_list(column.type) or not _fits(spec, name, column.type.value_type):
        wanted = {spec.times: "times or numbers", spec.dwell: "numbers"}
        raise DataError(
            f"feature '{spec.name}': column '{name}' holds {column.type}, expected lists of "
            f"{wanted.get(name, 'text or integers')}"
        )
    return column


def _fits(spec: FeatureSpec, name: str, kind: pa.DataType) -> bool:
    if pa.types.is_null(kind):
        return True
    if name == spec.dwell:
        return is_number(kind)
    if name == spec.times:
        return bool(is_number(kind) or pa.types.is_timestamp(kind) or is_text(kind))
    return is_category(kind)


def _numbers(times: pa.Array) -> tuple[NDArray[np.float64], bool]:
    """Times as microseconds, or numbers as they are; and whether they are times. Null is NaN."""
    if is_text(times.type):
        times = parsed_times(times)
    if pa.types.is_timestamp(times.type):
        values = timestamps(pa.chunked_array([pc.fill_null(times, 0)])).astype(np.float64)
        values[pc.is_null(times).to_numpy(zero_copy_only=False)] = np.nan
        return values, True
    return as_float_array(times), False


def parsed_times(texts: pa.Array) -> pa.Array:
    """Whole numbers, times of ISO 8601, or numbers that were written as text.

    Raises:
        DataError: a text is none of them.
    """
    for kind in (pa.int64(), pa.timestamp("us"), pa.timestamp("us", tz="UTC"), pa.float64()):
        try:
            return pc.cast(texts, kind)
        except pa.ArrowInvalid:
            continue
    example = next((text for text in texts.to_pylist() if text is not None), None)
    raise DataError(f"the times of a history hold {example!r}, expected numbers or ISO 8601")


def _kind(times: bool) -> str:
    return "times" if times else "numbers"
