"""Series, tests and forecasts of all values of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import ndtri

from offtower.config import TimeOptions
from offtower.errors import DataError
from offtower.evaluation.drift.forecast import Prediction, check_forecast, predict
from offtower.evaluation.drift.grid import TimeGrid
from offtower.evaluation.drift.hypotheses import drift_p, holm
from offtower.evaluation.drift.result import DriftSeries, Forecast, PolicyOverTime, TimeResult
from offtower.evaluation.drift.serial import FOUND, found_correlation, widening
from offtower.evaluation.drift.series import Series
from offtower.evaluation.intervals.methods import Interval
from offtower.evaluation.intervals.statistics import Functional, Statistics, finish
from offtower.evaluation.intervals.term_mean import TermMean
from offtower.evaluation.intervals.time_sums import TimeSums


@dataclass(frozen=True)
class TimedValue:
    """A functional with the statistics that hold its terms by time.

    Attributes:
        interval: of the value over the log, whose skewness a forecast takes over; None for none.
        possible: least and largest value.
    """

    functional: Functional
    statistics: Statistics
    interval: Interval | None = None
    possible: tuple[float, float] = (-np.inf, np.inf)


@dataclass(frozen=True)
class TimedPolicy:
    """The timed values of a policy. joint: confidence of its verdict."""

    value: TimedValue
    difference: TimedValue
    joint: float


@dataclass(frozen=True)
class OverTime:
    """The grid of a log, or why it has none.

    Attributes:
        grid: None where `reason` says why.
        correlation_p: adjusted p of independent rows; None where nothing was tested.
        correlated: whether intervals are widened for correlation in time.
    """

    options: TimeOptions
    confidence: float
    grid: TimeGrid | None = None
    reason: str | None = None
    correlation_p: float | None = None
    correlated: bool = False

    @classmethod
    def of(
        cls, sums: TimeSums, options: TimeOptions, confidence: float, values: Sequence[TimedValue]
    ) -> OverTime:
        """Cut the time, and test whether rows that are close in time are correlated.

        Args:
            values: that are tested.
        """
        try:
            grid = TimeGrid.of(sums, options)
        except DataError as error:
            return cls(options, confidence, reason=f"no values by period: {error}")
        series = [Series.of(grid, one.functional, one.statistics) for one in values]
        p = found_correlation(grid, series)
        correlated = p < FOUND if options.correlated is None else options.correlated
        return cls(options, confidence, grid, None, p, correlated)

    def widened(
        self, interval: Interval, functional: Functional, statistics: Statistics
    ) -> Interval:
        """An interval of the value over the log, for rows that are correlated in time."""
        if not self.correlated or self.grid is None or statistics.time is None:
            return interval
        series = Series.of(self.grid, functional, statistics)
        factor = widening(self.grid, series, interval.confidence)
        value = finish(functional, statistics).value
        return replace(
            interval,
            low=value - factor * (value - interval.low),
            high=value + factor * (interval.high - value),
        )

    @cached_property
    def no_forecast(self) -> str | None:
        """Why the log cannot carry a forecast."""
        if self.grid is None:
            return self.reason
        try:
            check_forecast(self.grid)
        except DataError as error:
            return str(error)
        return None

    def forecast(self, value: TimedValue, joint: float | None = None) -> Forecast | None:
        """The value in the future period; None where the log cannot carry it.

        joint: confidence of a second interval, for a verdict.
        """
        grid = self.grid
        if grid is None or self.no_forecast is not None:
            return None
        series = Series.of(grid, value.functional, value.statistics)
        if not series.varies:
            return None
        found = predict(grid, series)
        return Forecast(
            grid.future_name,
            min(max(found.value, value.possible[0]), value.possible[1]),
            _interval(found, value, self.confidence),
            None if joint is None else _interval(found, value, joint),
            None
            if found.half_life is None
            else found.half_life * grid.horizon / grid.future_length,
        )

    def result(
        self,
        logging: TimedValue,
        policies: Mapping[str, TimedPolicy],
        weights: Mapping[str, Statistics],
    ) -> TimeResult:
        """All series of an evaluation.

        Args:
            weights: by policy, statistics of w and w / (1 + w).
        """
        if self.grid is None:
            return TimeResult(reason=self.reason)
        weight, overlap = (TermMean(index, 2) for index in (0, 1))
        tested = [("the value of the logging policy", logging)]
        for name, one in policies.items():
            tested += [
                (f"the value of {name}", one.value),
                (f"the difference of {name} to the logging policy", one.difference),
                (f"the mean weight of {name}", TimedValue(weight, weights[name])),
                (
                    f"the overlap of {name} with the logging policy",
                    TimedValue(overlap, weights[name]),
                ),
            ]
        series = [Series.of(self.grid, one.functional, one.statistics) for _, one in tested]
        p = holm([drift_p(self.grid, one) for one in series])
        made = [
            self._series(name, one, level)
            for (name, _), one, level in zip(tested, series, p, strict=True)
        ]
        over_time = {}
        for i, (name, one) in enumerate(policies.items()):
            value, difference, *others = made[1 + 4 * i : 5 + 4 * i]
            over_time[name] = PolicyOverTime(
                replace(value, forecast=self.forecast(one.value)),
                replace(difference, forecast=self.forecast(one.difference, one.joint)),
                *others,
            )
        return TimeResult(
            unit=self.grid.unit,
            periods=self.grid.periods,
            alpha=self._alpha,
            logging=replace(made[0], forecast=self.forecast(logging)),
            policies=over_time,
            correlation_p=self.correlation_p,
            correlated=self.correlated,
            seasons=self.grid.seasons,
            reason=self.no_forecast,
        )

    @property
    def _alpha(self) -> float:
        return 1.0 - self.confidence

    def _series(self, name: str, series: Series, p: float) -> DriftSeries:
        assert self.grid is not None
        value, error = series.by_period(self.grid)
        return DriftSeries(name, tuple(value.tolist()), tuple(error.tolist()), p, p < self._alpha)


def _interval(found: Prediction, value: TimedValue, confidence: float) -> Interval:
    """Interval of a forecast, as much wider than a normal one as that of the value over the log."""
    below, above = found.distances(confidence)
    method, by_user = "forecast", value.statistics.users is not None
    if value.interval is not None:
        estimate = finish(value.functional, value.statistics)
        normal = float(ndtri(0.5 + 0.5 * value.interval.confidence)) * estimate.std_error
        if normal > 0.0:
            below *= max(1.0, (estimate.value - value.interval.low) / normal)
            above *= max(1.0, (value.interval.high - estimate.value) / normal)
    interval = Interval(found.value - below, found.value + above, confidence, method, by_user)
    return interval.within(*value.possible)
