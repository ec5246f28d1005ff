"""Cut a log's time into periods for people and cells for models.

Values are reported by period. Trends, tests and forecasts are fitted to cells, several to a period:
with six weeks of a log, periods are weeks and cells are days.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from offtower.config import TimeOptions
from offtower.data.durations import parse_duration
from offtower.errors import DataError
from offtower.evaluation.intervals.time_sums import DAY, WEEK, WIDTHS, TimeSums
from offtower.evaluation.rows import Array, IntArray

MOST_PERIODS = 16
"""A period is the shortest unit of the calendar of which a log has at most so many."""
PLAIN_PERIODS = 8
"""Periods of a log whose times are no dates."""
CELLS = 16
"""Cells that a log has at least, where its times allow it."""
MOST_CELLS = 256
LEAST_CELLS = 8
_CALENDAR = (10**14, 10**16)
"""Microseconds since 1970 from 1973 to 2286."""
_NAMES = {
    1_000_000: "second",
    60_000_000: "minute",
    3_600_000_000: "hour",
    DAY: "day",
    WEEK: "week",
    28 * DAY: "4 weeks",
    364 * DAY: "52 weeks",
}
LEAST_ROWS = 30
"""Rows of a period, in the mean, unless its length is given."""
_SHARE = 0.5
"""A last period that is shorter than this share of the others joins the one before."""


@dataclass(frozen=True)
class Period:
    """A period of a log: its name, first and last time (as text), and rows."""

    name: str
    start: str
    end: str
    rows: float


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """Where each sum of a log falls.

    Attributes:
        unit: name of a period: week, or period for times that are no dates.
        periods: in order.
        bin: (g,) number of the bin of each sum, from 0 without gaps. cell: (g,) of its cell.
        period_of_cell: (m,) period of each cell.
        time: (m,) mean time of a cell's rows; the log lasts from 0 to 1.
        season: (m, s) columns of seasons, which have mean 0 over a cycle.
        future_time, future_season: the middle of the future period, and its mean season (s,).
        future_length: in units of the log's time. future_cells: its cells.
        horizon: periods from the end of the log to that of the forecast.
        seasons: names of the seasons.
    """

    unit: str
    periods: tuple[Period, ...]
    bin: IntArray
    cell: IntArray
    period_of_cell: IntArray
    time: Array
    season: Array
    future_time: float
    future_season: Array
    future_length: float
    future_cells: int
    horizon: int
    seasons: tuple[str, ...]

    @classmethod
    def of(cls, sums: TimeSums, options: TimeOptions) -> TimeGrid:
        """The grid of a log.

        Raises:
            DataError: the rows have one time only, or fall into one period.
        """
        if not sums.first < sums.last or np.unique(sums.bins).size < 2:
            raise DataError(
                "every row has the same time, so that nothing can be said about change over time: "
                "check the column that the schema names as 'timestamp'"
            )
        calendar = _CALENDAR[0] <= sums.first <= _CALENDAR[1]
        end = sums.start(int(sums.bins[-1]) + 1)
        start = sums.start(int(sums.bins[0]))
        width = _period(sums, options, calendar, start, end)
        if calendar:  # Weeks begin on the day of the first row.
            align = min(width, DAY)
            start = sums.start(0) + (start - sums.start(0)) // align * align
        cell_width = _cell_width(sums, width, end - start, calendar)
        center = np.array([sums.start(int(b)) for b in sums.bins]) + sums.width // 2
        period = (center - start) // width
        last = int(period[-1])
        if last and (end - start - last * width) < _SHARE * width:
            period = np.minimum(period, last - 1)
        # Cells never cross the border of a period.
        inside = (center - start) // cell_width
        _, cell = np.unique(period * (2**40) + inside, return_inverse=True)
        _, period = np.unique(period, return_inverse=True)
        if period[-1] == 0:
            raise DataError(
                f"the log lies within one period ({_length(width, calendar)}), so that nothing can "
                "be said about change over time: evaluate a longer log, or set a shorter "
                "evaluation.time.period"
            )
        mass = np.bincount(cell, sums.count)
        mean = np.asarray(np.bincount(cell, sums.count * (center - start)) / mass, np.float64)
        period_of_cell = np.zeros(mass.size, dtype=np.int64)
        period_of_cell[cell] = period
        unit = _unit(width, calendar)
        seasons = _seasons(mean + start, cell_width, end - start, calendar)
        length = options.horizon * width
        ahead = max(1, round(length / cell_width))
        future = end + (np.arange(ahead) + 0.5) * (length / ahead)
        coded = [one.coded(mean + start, np.asarray(future, np.float64)) for one in seasons]
        _, number = np.unique(sums.bins, return_inverse=True)
        return cls(
            unit=unit,
            periods=_named(sums, period, unit, calendar),
            bin=number,
            cell=cell,
            period_of_cell=period_of_cell,
            time=mean / (end - start),
            season=np.concatenate([np.zeros((mass.size, 0)), *(c[0] for c in coded)], axis=1),
            future_time=1.0 + 0.5 * length / (end - start),
            future_season=np.concatenate([np.zeros(0), *(c[1] for c in coded)]),
            future_length=length / (end - start),
            future_cells=ahead,
            horizon=options.horizon,
            seasons=tuple(one.name for one in seasons),
        )

    @property
    def cells(self) -> int:
        """Number of cells with rows."""
        return int(self.time.size)

    @property
    def design(self) -> Array:
        """(m, p) columns of a linear trend with seasons; the first is 1, the second the time."""
        return np.concatenate(
            [np.ones((self.cells, 1)), self.time[:, None] - 0.5, self.season], axis=1
        )

    @property
    def future_design(self) -> Array:
        """(p,) the same for the future period."""
        return np.concatenate([[1.0, self.future_time - 0.5], self.future_season])

    @property
    def future_name(self) -> str:
        """The future period in words: the next week, the next 2 weeks."""
        if self.horizon == 1:
            return f"the next {self.unit}"
        if not self.unit[0].isalpha():
            return f"the next {self.horizon} periods of {self.unit}"
        return f"the next {self.horizon} {self.unit}s"


@dataclass(frozen=True)
class _Season:
    """A cycle of the calendar, cut in slots.

    cycle, slot: their lengths in microseconds.
    """

    name: str
    cycle: int
    slot: int

    @property
    def slots(self) -> int:
        return self.cycle // self.slot

    def coded(self, time: Array, future: Array) -> tuple[Array, Array]:
        """Columns (m, s) of times of the log, and their mean (s,) over future times."""
        seen = np.unique(self._slot(time))[1:]
        columns = (self._slot(time)[:, None] == seen) - 1.0 / self.slots
        ahead = (self._slot(future)[:, None] == seen) - 1.0 / self.slots
        return columns, ahead.mean(axis=0)

    def _slot(self, time: Array) -> IntArray:
        since = (np.asarray(time, dtype=np.float64) + 3 * DAY) % self.cycle
        return np.asarray(since // self.slot, dtype=np.int64)


def _seasons(time: Array, cell: int, span: int, calendar: bool) -> list[_Season]:
    """The cycles of which the log has two or more, as far as its cells can carry them."""
    if not calendar:
        return []
    found = []
    if cell < DAY and DAY % cell == 0 and span >= 2 * DAY:
        found.append(_Season("hour of the day", DAY, cell))
    if cell <= DAY and span >= 2 * WEEK:
        found.append(_Season("day of the week", WEEK, DAY))
    while found and time.size - 2 - sum(one.slots - 1 for one in found) < LEAST_CELLS:
        found.pop()
    return found


def _period(sums: TimeSums, options: TimeOptions, calendar: bool, start: int, end: int) -> int:
    """Length of a period, in the unit of the times."""
    given, least = options.period, sums.width
    if given is None:
        rows = float(sums.count.sum())
        enough = int(min(MOST_PERIODS if calendar else PLAIN_PERIODS, rows // LEAST_ROWS))
        if enough < 2:
            raise DataError(
                f"the log has {rows:,.0f} rows, and two periods of {LEAST_ROWS} are the least that "
                "says anything about change over time: evaluate a longer log, or set "
                "evaluation.time.period"
            )
        if not calendar:
            return -(-(end - start) // (enough * least)) * least
        wide = (w for w in WIDTHS if w >= least and (end - start) <= enough * w)
        return next(wide, end - start)
    if isinstance(given, str) and not calendar:
        raise DataError(
            f"evaluation.time.period is '{given}', but the log's timestamps are no dates: give a "
            f"number in their unit (they reach from {sums.first:,} to {sums.last:,})"
        )
    width = parse_duration(given, "evaluation.time.period") if isinstance(given, str) else given
    width = round(width)
    if not least <= width:
        raise DataError(
            f"evaluation.time.period is {given}, shorter than {_length(least, calendar)}, the "
            f"bins that a log of this length is summed in: set at least that"
        )
    if end - start > MOST_CELLS * width:
        raise DataError(
            f"evaluation.time.period is {given}, and the log has more than {MOST_CELLS} of these: "
            "set a longer period"
        )
    return width


def _cell_width(sums: TimeSums, period: int, span: int, calendar: bool) -> int:
    """Width of a cell, which divides a period."""
    if not calendar:
        parts = max(1, math.ceil(2 * CELLS * period / span))
        return max(sums.width, period // parts)
    fitting = [w for w in WIDTHS if sums.width <= w <= period and period % w == 0]
    enough = [w for w in fitting if span >= CELLS * w]
    return enough[-1] if enough else fitting[0] if fitting else period


def _unit(width: int, calendar: bool) -> str:
    if not calendar:
        return "period"
    return _NAMES.get(width) or _length(width, calendar)


def _length(width: int, calendar: bool) -> str:
    """A length of time in words."""
    if not calendar:
        return f"{width:,} units of time"
    for size, name in reversed(_NAMES.items()):
        if name[0].isalpha() and width % size == 0:
            count = width // size
            return f"{count} {name}{'' if count == 1 else 's'}"
    return f"{width / 1e6:g} seconds"


def _named(sums: TimeSums, period: IntArray, unit: str, calendar: bool) -> tuple[Period, ...]:
    name = unit if unit[0].isalpha() else "period"
    rows = np.bincount(period, sums.count)
    found = []
    for number in range(rows.size):
        bins = sums.bins[period == number]
        first = max(sums.start(int(bins[0])), sums.first)
        last = min(sums.start(int(bins[-1]) + 1) - 1, sums.last)
        found.append(
            Period(
                f"{name} {number + 1}",
                _text(first, calendar),
                _text(last, calendar),
                float(rows[number]),
            )
        )
    return tuple(found)


def _text(time: int, calendar: bool) -> str:
    if not calendar:
        return f"{time:,}"
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time)
    return moment.strftime("%Y-%m-%d %H:%M")
