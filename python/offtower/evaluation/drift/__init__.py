"""Values over time: estimates by period, tests for drift, and the value of a future period."""

from offtower.evaluation.drift.grid import TimeGrid
from offtower.evaluation.drift.over_time import OverTime, TimedPolicy, TimedValue
from offtower.evaluation.drift.result import DriftSeries, Forecast, TimeResult
from offtower.evaluation.drift.verdicts import qualify

__all__ = [
    "DriftSeries",
    "Forecast",
    "OverTime",
    "TimeGrid",
    "TimeResult",
    "TimedPolicy",
    "TimedValue",
    "qualify",
]
