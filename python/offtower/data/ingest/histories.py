"""Histories from a plain log: the earlier events of each row's user.

Rows are spilled by user, so that memory holds the users of one partition; each partition is sorted,
and a row's events are a span of it. The spans are read again in the order of the rows. The disk
holds some tens of bytes a row, whatever the length of the histories.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_float_array, hashed, timestamps
from offtower.data.feature_schema import FeatureSpec
from offtower.data.ingest.writing import write_rows
from offtower.data.join.spill import PARTITIONS, Spill
from offtower.data.location import Location
from offtower.data.log import ParquetLog, write_log
from offtower.data.schema import LogSchema
from offtower.data.source import CheckedUnits, UnitTally
from offtower.errors import ConfigError, DataError
from offtower.execution import Execution
from offtower.progress import Progress

PREFIX = ".history-"
"""Of the temporary folders."""
NAME, TIMES, REWARDS = "history", "history_times", "history_rewards"
_EVENT = np.dtype([("item", "<i8"), ("time", "<i8"), ("reward", "<f8")])
_RECORD = np.dtype(
    [("key", "<u8", (1,)), ("row", "<i8"), ("item", "<i8"), ("time", "<i8"), ("reward", "<f8")]
)


@dataclass(frozen=True)
class HistoryOptions:
    """Which events the histories of a log have.

    Attributes:
        key: column whose value the events of a history share; "user" is the schema's `user_id`.
        length: most events of a history, the newest.
        rewarded: leave events without a positive reward out.
    """

    key: str
    length: int
    rewarded: bool = False

    @classmethod
    def parse(cls, text: str) -> HistoryOptions:
        """Parse KEY,LENGTH or KEY,LENGTH,rewarded.

        Raises:
            ConfigError: it is of another form.
        """
        key, *rest = (part.strip() for part in text.split(","))
        if not key or not rest or not rest[0].isdecimal() or int(rest[0]) < 1:
            rest = []
        if rest[1:] not in ([], ["rewarded"]) or not rest:
            raise ConfigError(
                f"--history '{text}' must be a column and the most events, such as user,50, or "
                "user,50,rewarded for events with a positive reward only"
            )
        return cls(key, int(rest[0]), len(rest) > 1)

    def column(self, schema: LogSchema) -> str:
        """The column of the key.

        Raises:
            ConfigError: the schema names no such column, no timestamp, or a column that histories
                will have.
        """
        column = schema.user_id if self.key == "user" else self.key
        if column is None or column not in schema.columns:
            raise ConfigError(
                f"--history {self.key}: the log schema names no "
                + ("user_id" if column is None else f"column '{column}'")
            )
        if schema.timestamp is None:
            raise ConfigError(
                "--history needs the rows' times, since a history ends before its row: name "
                "'timestamp' in the log schema"
            )
        taken = {NAME, TIMES, REWARDS} & {*schema.columns, *(spec.name for spec in schema.context)}
        if taken:
            raise ConfigError(
                f"--history writes the column '{min(taken)}', which the log schema names already"
            )
        return column

    def extend(self, schema: LogSchema) -> LogSchema:
        """The schema with the feature `history`."""
        spec = FeatureSpec(
            name=NAME, kind="history", length=self.length, times=TIMES, dwell=REWARDS
        )
        return replace(schema, context=(*schema.context, spec))


def write_with_histories(
    out: Location,
    rows: CheckedUnits,
    catalogue: Catalogue,
    options: HistoryOptions,
    execution: Execution,
) -> UnitTally:
    """Write the checked rows as `write_rows` does, each with the earlier events of its key.

    Events at the row's own time are left out, also those of other rows. Ties among earlier ones are
    in the order of the log.

    Raises:
        ConfigError: see `HistoryOptions.column`, or the rows are read on several machines.
    """
    key = options.column(rows.schema)
    if execution.mapper.distributed:
        raise ConfigError("--history sorts the rows on this machine: leave --ray out")
    progress = execution.progress
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=out.parent.local) as folder:
        written = write_rows(Location.of(folder) / "rows", rows, execution)
        plain = ParquetLog.open(Location.of(folder) / "rows")
        spill = Spill(Path(folder) / "records", _RECORD)
        progress.start("collecting events", plain.num_rows)
        _spill(plain, catalogue, key, spill, progress)
        progress.finish()
        events, spans = _sort(spill, Path(folder), plain.num_rows, options)
        progress.start("writing histories", plain.num_rows)
        tables = _with_events(plain, catalogue, events, spans, progress)
        write_log(out, tables, options.extend(plain.schema))
        progress.finish()
    return written


def _spill(
    plain: ParquetLog, catalogue: Catalogue, key: str, spill: Spill, progress: Progress
) -> None:
    schema = plain.schema
    assert schema.timestamp is not None, "options.column checked it"
    columns = list(dict.fromkeys([key, schema.action, schema.timestamp, schema.reward]))
    first = 0
    for table in plain.read_row_groups(range(len(plain.row_group_sizes)), columns):
        records = np.empty(table.num_rows, dtype=_RECORD)
        records["key"][:, 0] = hashed(table.column(key))
        records["row"] = np.arange(first, first + table.num_rows)
        records["item"] = catalogue.index_of(table.column(schema.action))
        records["time"] = _whole_times(table.column(schema.timestamp), schema.timestamp)
        records["reward"] = as_float_array(table.column(schema.reward))
        spill.add(records)
        first += table.num_rows
        progress.advance(table.num_rows)
    spill.close()


def _whole_times(column: pa.ChunkedArray, name: str) -> NDArray[np.int64]:
    times = timestamps(column)
    if pa.types.is_floating(column.type) and not (as_float_array(column) == times).all():
        raise DataError(
            f"--history needs whole numbers or times in column '{name}', which holds fractions"
        )
    return times


def _sort(
    spill: Spill, folder: Path, rows: int, options: HistoryOptions
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Events by key and time in a file, and by row the first and last of its history."""
    spans: NDArray[np.int64] = np.lib.format.open_memmap(
        folder / "spans.npy", mode="w+", dtype=np.int64, shape=(rows, 2)
    )
    done = 0
    path = folder / "events"
    with open(path, "wb") as file:
        for partition in range(PARTITIONS):
            records = spill.read(partition)
            records = records[np.lexsort((records["row"], records["time"], records["key"][:, 0]))]
            kept = np.ones(len(records), dtype=bool)
            if options.rewarded:
                kept = records["reward"] > 0
            events = np.empty(int(kept.sum()), dtype=_EVENT)
            for name in _EVENT.names or ():
                events[name] = records[name][kept]
            events.tofile(file)
            # Events before each record, and before the first one of its key, and of its time.
            before = done + np.cumsum(kept) - kept
            of_key, of_time = _starts(records["key"][:, 0]), _starts(records["time"])
            last = before[np.maximum(of_key, of_time)]
            spans[records["row"], 0] = np.maximum(before[of_key], last - options.length)
            spans[records["row"], 1] = last
            done += len(events)
    if not done:
        return np.empty(0, dtype=_EVENT), spans
    return np.memmap(path, dtype=_EVENT, mode="r"), spans


def _starts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) index of the first of the equal neighbors of each value."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    starts: NDArray[np.int64] = np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))
    return starts


def _with_events(
    plain: ParquetLog,
    catalogue: Catalogue,
    events: NDArray[np.void],
    spans: NDArray[np.int64],
    progress: Progress,
) -> Iterator[pa.Table]:
    assert plain.schema.timestamp is not None, "options.column checked it"
    first = 0
    for table in plain.tables():
        part = spans[first : first + table.num_rows]
        first += table.num_rows
        length = part[:, 1] - part[:, 0]
        offsets = np.concatenate([[0], np.cumsum(length)])
        index = np.arange(offsets[-1]) + np.repeat(part[:, 0] - offsets[:-1], length)
        found = events[index]
        ends = pa.array(offsets, pa.int32())
        times, kind = pa.array(found["time"]), table.column(plain.schema.timestamp).type
        if pa.types.is_timestamp(kind):
            times = times.cast(pa.timestamp("us", kind.tz))
        for name, values in (
            (NAME, catalogue.item_ids.take(pa.array(found["item"]))),
            (TIMES, times),
            (REWARDS, pa.array(found["reward"])),
        ):
            table = table.append_column(name, pa.ListArray.from_arrays(ends, values))
        yield table
        progress.advance(table.num_rows)
