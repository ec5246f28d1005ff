"""Pending outcomes: which rows of a log are old enough, and what their missing rewards are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import as_float_array, null_mask, timestamps
from offtower.data.durations import parse_duration
from offtower.data.schema import LogSchema, Outcomes
from offtower.errors import DataError

NULL_TIME = np.iinfo(np.int64).min
"""Stands for a null time."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class OutcomeCounts:
    """What the section `outcomes` did to a log.

    Attributes:
        young: rows left out, since their outcome could still have come.
        young_rewarded: those of them that had a reward already.
        late: rewards ignored, since they came after the maturity.
        missing: rows that took the reward `outcomes.missing`.
    """

    young: int = 0
    young_rewarded: int = 0
    late: int = 0
    missing: int = 0

    def __add__(self, other: OutcomeCounts) -> OutcomeCounts:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return OutcomeCounts(**sums)

    def to_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class SettledRows:
    """Rows with their final rewards.

    Attributes:
        table: all rows; a missing reward is filled, that of a young row is null.
        mature: (n,) mask of the rows to keep.
    """

    table: pa.Table
    mature: NDArray[np.bool_]
    counts: OutcomeCounts


def settle(table: pa.Table, schema: LogSchema) -> SettledRows:
    """Find the mature rows, and fill their missing rewards by `schema.outcomes`.

    All rows younger than the maturity are left out, rewarded or not: to keep those that were
    rewarded early would bias the mean reward upward.

    Raises:
        DataError: the time columns do not fit the maturity, or to each other.
    """
    outcomes, decided_by = schema.outcomes, schema.timestamp
    assert outcomes is not None and outcomes.as_of is not None and decided_by is not None
    decided = table.column(decided_by)
    span = duration_in(decided, outcomes.maturity, decided_by)
    time = comparable_times(decided)
    # A null time is a bad row, which the row check reports.
    mature = (time == NULL_TIME) | (time <= time_in(decided, outcomes.as_of, decided_by) - span)
    late = np.zeros(table.num_rows, dtype=bool)
    if outcomes.time is not None:
        came = table.column(outcomes.time)
        check_same_clock(decided.type, came.type, decided_by, outcomes.time)
        at = comparable_times(came)
        late = (at != NULL_TIME) & (time != NULL_TIME) & (at > time + span)
    rewarded = np.zeros(table.num_rows, dtype=bool)
    unfilled = np.zeros(table.num_rows, dtype=bool)
    for name in schema.reward_columns:
        column = table.column(name)
        known = ~null_mask(column)
        rewarded |= known
        unfilled |= ~known | late
        table = table.set_column(
            table.column_names.index(name),
            name,
            _filled(column, late, mature, outcomes.missing),
        )
    fills = not isinstance(outcomes.missing, str)
    return SettledRows(
        table,
        mature,
        OutcomeCounts(
            young=int((~mature).sum()),
            young_rewarded=int((rewarded & ~mature).sum()),
            late=int((rewarded & late & mature).sum()),
            missing=int((unfilled & mature).sum()) if fills else 0,
        ),
    )


def newest_time(columns: Iterable[pa.ChunkedArray]) -> int | None:
    """Return the latest of some times, as `comparable_times` has them; None without any."""
    newest = None
    for column in columns:
        times = comparable_times(column)
        times = times[times != NULL_TIME]
        if times.size:
            newest = max(int(times.max()), newest if newest is not None else NULL_TIME)
    return newest


def collected_at(outcomes: Outcomes, newest: int | None, is_number: bool) -> Outcomes:
    """Return the section with `as_of` set: by default to the newest time of the log."""
    if outcomes.as_of is not None or newest is None:
        return outcomes
    at = float(newest) if is_number else _EPOCH + timedelta(microseconds=newest)
    return replace(outcomes, as_of=at)


def stored_schema(schema: LogSchema) -> LogSchema:
    """Return the schema of an ingested log, whose outcomes are all final."""
    return schema if schema.outcomes is None else replace(schema, outcomes=None)


def comparable_times(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return (n,) times: timestamps in microseconds, numbers as they are; NULL_TIME for null."""
    unknown = null_mask(column)
    if pa.types.is_floating(column.type):
        unknown |= ~np.isfinite(as_float_array(column))
        column = pa.chunked_array([pa.array(np.where(unknown, 0.0, as_float_array(column)))])
    elif unknown.any():
        column = pc.fill_null(column, pa.scalar(0, pa.int64()).cast(column.type))
    return np.where(unknown, NULL_TIME, timestamps(column))


def duration_in(column: pa.ChunkedArray, value: str | float, name: str) -> int:
    """Return a duration in the unit of a time column.

    Raises:
        DataError: the column holds numbers and the duration has a unit, or the other way round.
    """
    if pa.types.is_timestamp(column.type):
        if isinstance(value, str):
            return parse_duration(value, "the duration")
        raise DataError(f"column '{name}' holds times: give the duration a unit, such as 7d")
    if isinstance(value, str):
        raise DataError(
            f"column '{name}' holds numbers, whose unit is unknown: give the duration as a number "
            f"in that unit (7d are 604800 in seconds), got '{value}'"
        )
    return int(value)


def time_in(column: pa.ChunkedArray, value: datetime | float, name: str) -> int:
    """Return a time in the unit of a time column. Raises DataError as `duration_in`."""
    if pa.types.is_timestamp(column.type):
        if isinstance(value, datetime):
            zoned = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            return (zoned - _EPOCH) // timedelta(microseconds=1)
        raise DataError(f"column '{name}' holds times: give as_of as a time, got {value:g}")
    if isinstance(value, datetime):
        raise DataError(f"column '{name}' holds numbers: give as_of in their unit, got {value}")
    return int(value)


def check_same_clock(
    decided: pa.DataType, came: pa.DataType, decided_name: str, came_name: str
) -> None:
    """Refuse two time columns that cannot be compared.

    Raises:
        DataError: one holds times and the other numbers, or only one has a time zone.
    """
    if pa.types.is_timestamp(decided) != pa.types.is_timestamp(came):
        raise DataError(
            f"column '{decided_name}' is {decided} and column '{came_name}' is {came}: give "
            "both as times, or both as numbers of one unit"
        )
    if pa.types.is_timestamp(decided) and (decided.tz is None) != (came.tz is None):
        raise DataError(
            f"column '{decided_name}' is {decided} and column '{came_name}' is {came}: only "
            "one has a time zone; give both one, or neither"
        )


def check_outcome_columns(names: list[str], schema: LogSchema, file: str) -> None:
    """Refuse a source without the reward: a log that no outcome was joined to.

    Raises:
        DataError: a column of the reward is missing.
    """
    if schema.rewards and schema.reward in names:
        raise DataError(
            f"'{file}' has a column '{schema.reward}', which ingest would make of the weighted sum "
            "of the schema's rewards: name another one in `reward`"
        )
    missing = [name for name in schema.reward_columns if name not in names]
    if not missing:
        return
    served = "pscore_error" in names
    raise DataError(
        f"'{file}' has no column '{missing[0]}', the reward: "
        + ("these are served decisions, and " if served else "")
        + "no outcome was joined to them. Join the outcomes first: offtower join DECISIONS "
        "OUTCOMES --out JOINED.parquet, and ingest the joined file"
    )


def _filled(
    column: pa.ChunkedArray,
    late: NDArray[np.bool_],
    mature: NDArray[np.bool_],
    missing: float | str,
) -> pa.ChunkedArray:
    filled: Any = column
    if late.any():
        filled = pc.if_else(pa.array(late), pa.scalar(None, column.type), filled)
    if not isinstance(missing, str):
        filled = pc.cast(filled, pa.float64(), safe=False)
        filled = pc.if_else(pc.and_(pc.is_null(filled), pa.array(mature)), missing, filled)
    return filled if isinstance(filled, pa.ChunkedArray) else pa.chunked_array([filled])
