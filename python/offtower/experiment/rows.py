"""Rows of a running A/B test: read in the order in which units became complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.columns import timestamps
from offtower.data.durations import parse_duration
from offtower.data.formats.kinds import ColumnKind
from offtower.data.location import AnyPath
from offtower.data.log import ParquetLog
from offtower.data.source import open_source
from offtower.errors import ConfigError, DataError
from offtower.experiment.assignment import Array

Chunk = tuple[Array, NDArray[np.bool_]]
"""Rewards of units, and whether the new policy served them."""

_CHUNK = 65_536


@dataclass(frozen=True)
class ArmColumns:
    """Columns of the rows, and the names of the arms.

    Attributes:
        new: value of `arm` for the new policy. current: of the other; None where there are two.
        time: of each row; rows must be in its order. Required with `user`.
        user: makes users the units: each counts once, by its mean reward in the time `window` after
            its first row, and as soon as that is over.
    """

    new: str
    current: str | None = None
    arm: str = "arm"
    reward: str = "reward"
    time: str | None = None
    user: str | None = None
    window: str | None = None

    def __post_init__(self) -> None:
        given = (self.user is not None, self.window is not None)
        if any(given) and (not all(given) or self.time is None):
            raise ConfigError(
                "users as units need a user column, a time column and a window (such as 7d): a "
                "user counts once, when the window after its first row is over, so that later "
                "rows change no earlier reading"
            )


def units_of_file(path: AnyPath, columns: ArmColumns) -> Iterator[Chunk]:
    """Units of a file or folder (CSV, Parquet and others), in chunks.

    Raises:
        DataError: a column is missing, a cell is bad or null, an arm is unknown, rows are not in
            the order of their time, or a user is in both arms.
    """
    rows = _rows(path, columns)
    if columns.user is None:
        for reward, new, _, _ in rows:
            yield reward, new
        return
    assert columns.window is not None, "checked when made"
    parts = list(rows)
    if not parts:
        return
    reward, new, time, user = (np.concatenate(column) for column in zip(*parts, strict=True))
    yield from user_units(reward, new, time, user, parse_duration(columns.window, "the window"))


def units_of_logs(new: AnyPath, current: AnyPath) -> Iterator[Chunk]:
    """Units of the logs that two policies served, merged by their times.

    Raises:
        DataError: a log has no timestamps, or cannot be read.
    """
    rewards, times, arms = [], [], []
    for path, is_new in ((new, True), (current, False)):
        log = ParquetLog.open(path)
        schema = log.schema
        if schema.timestamp is None:
            raise DataError(
                f"the log at '{path}' has no timestamps (schema key 'timestamp'): the rows of two "
                "logs are merged by them"
            )
        for table in log.read_row_groups(
            range(len(log.row_group_sizes)), [schema.reward, schema.timestamp]
        ):
            rewards.append(table[schema.reward].to_numpy().astype(np.float64))
            times.append(timestamps(table[schema.timestamp]))
            arms.append(np.full(table.num_rows, is_new))
    order = np.argsort(np.concatenate(times), kind="stable")
    reward, arm = np.concatenate(rewards)[order], np.concatenate(arms)[order]
    yield from _chunks(reward, arm)


def user_units(
    reward: Array,
    new: NDArray[np.bool_],
    time: NDArray[np.int64],
    user: NDArray[np.object_],
    window: int,
) -> Iterator[Chunk]:
    """Users whose window is over, in the order in which it ended, with their mean rewards.

    Args:
        time: microseconds. window: likewise.

    Raises:
        DataError: a user is in both arms.
    """
    names, first, index = np.unique(user, return_index=True, return_inverse=True)
    arm = new[first]
    if (arm[index] != new).any():
        wrong = names[index[int(np.argmax(arm[index] != new))]]
        raise DataError(
            f"user '{wrong}' is in both arms: units are assigned once. Leave such users out before "
            "the test is read, or assign requests and leave the user column out"
        )
    start = time[first]
    within = time < start[index] + window
    count = np.bincount(index[within], minlength=names.size)
    mean = np.bincount(index[within], reward[within], minlength=names.size) / count
    complete = np.flatnonzero(start + window <= time.max())
    order = complete[np.lexsort((first[complete], start[complete]))]
    yield from _chunks(mean[order], arm[order])


def _chunks(reward: Array, new: NDArray[np.bool_]) -> Iterator[Chunk]:
    for start in range(0, reward.size, _CHUNK):
        yield reward[start : start + _CHUNK], new[start : start + _CHUNK]


def _rows(
    path: AnyPath, columns: ArmColumns
) -> Iterator[tuple[Array, NDArray[np.bool_], NDArray[np.int64], NDArray[np.object_]]]:
    """Rewards, arms, times and users of the rows; the last two are empty without their columns."""
    kinds: dict[str, ColumnKind] = {columns.arm: "text", columns.reward: "number"}
    if columns.time is not None:
        kinds[columns.time] = "time"
    if columns.user is not None:
        kinds[columns.user] = "text"
    source = open_source(path, kinds)
    if columns.user is not None and columns.time is not None:
        kind = source.schema.field(columns.time).type
        if not pa.types.is_timestamp(kind):
            raise DataError(
                f"'{path}': column '{columns.time}' is {kind}, and a window needs timestamps"
            )
    other, latest, row = columns.current, None, 0
    for unit in range(len(source)):
        for batch in source.batches(unit):
            table = pa.Table.from_batches([batch])
            for name in kinds:
                if table[name].null_count:
                    at = row + int(np.argmax(table[name].is_null().to_numpy()))
                    raise DataError(
                        f"'{path}', row {at}: column '{name}' is null. A reward that may still "
                        "come is no 0: leave out the rows of both arms that are too young for it"
                    )
            names = table[columns.arm].to_numpy()
            new = names == columns.new
            others = sorted({str(name) for name in names[~new]})
            if other is None and others:
                other = others[0]
            if columns.current is None and set(others) - {other}:
                raise DataError(
                    f"'{path}' has the arms {', '.join(sorted({*others, str(other)}))} beside "
                    f"'{columns.new}': name the one to compare with (--current)"
                )
            kept = new | (names == other)
            time = np.empty(0, dtype=np.int64)
            if columns.time is not None:
                time = timestamps(table[columns.time])
                before = np.concatenate([[time[0] if latest is None else latest], time])
                if time.size and (np.diff(before) < 0).any():
                    at = row + int(np.argmax(np.diff(before) < 0))
                    raise DataError(
                        f"'{path}', row {at}: its time is before that of the row above. Sort the "
                        "rows by time, so that every reading sees the same beginning"
                    )
                latest = int(time[-1]) if time.size else latest
                time = time[kept]
            user = np.empty(0, dtype=object)
            if columns.user is not None:
                user = table[columns.user].to_numpy()[kept]
            row += len(names)
            yield table[columns.reward].to_numpy().astype(np.float64)[kept], new[kept], time, user
