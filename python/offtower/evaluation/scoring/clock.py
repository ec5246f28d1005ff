"""Times of a log's rows in microseconds."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from offtower.config import TimeOptions
from offtower.data.columns import is_number, timestamps
from offtower.data.log import Log
from offtower.errors import ConfigError
from offtower.evaluation.rows import IntArray

_UNITS = ((10**8, 10**10, 10**6, 1), (10**11, 10**13, 1000, 1), (10**17, 10**19, 1, 1000))
"""From, to, factor, divisor: numbers of seconds, milliseconds and nanoseconds since 1970, in years
from 1973 to 2286."""


def check_times(options: TimeOptions, *, has_times: bool) -> None:
    """Raise ConfigError where options of time are set for rows without times."""
    given = [
        f"evaluation.time.{one.name}"
        for one in fields(options)
        if getattr(options, one.name) != one.default
    ]
    if given and not has_times:
        raise ConfigError(
            f"{' and '.join(given)} needs the time of each row, and the log has none: name its "
            "column as 'timestamp' in the schema (rows in memory: pass time), or leave it out"
        )


@dataclass(frozen=True)
class LogClock:
    """Factor and divisor that make microseconds of a log's timestamps; both 1 for numbers that are
    no times since 1970."""

    factor: int
    divisor: int

    @classmethod
    def of(cls, log: Log) -> LogClock | None:
        """The clock of a log, by the type and size of its first timestamps; None without any."""
        name = log.schema.timestamp
        if name is None:
            return None
        # Missing times, and those of a wrong type, are bad rows, which the row check reports.
        column = log.read_row_group(0, [name]).column(name).drop_null()
        if not len(column) or not is_number(column.type):
            return cls(1, 1)
        middle = int(np.median(timestamps(column)))
        for low, high, factor, divisor in _UNITS:
            if low <= middle < high:
                return cls(factor, divisor)
        return cls(1, 1)

    def time(self, timestamp: IntArray | None) -> IntArray | None:
        """(n,) microseconds since 1970, or the numbers as they are."""
        if timestamp is None or self.factor == self.divisor:
            return timestamp
        return np.asarray(timestamp * self.factor // self.divisor, dtype=np.int64)
