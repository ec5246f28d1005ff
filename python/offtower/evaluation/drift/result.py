"""What an evaluation says about time: plain numbers, and sentences for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from offtower.evaluation.drift.grid import Period
from offtower.evaluation.drift.serial import FOUND
from offtower.evaluation.intervals.methods import Interval

Show = Callable[[float], str]


def _four_digits(value: float) -> str:
    return f"{value:.4g}"


@dataclass(frozen=True)
class Forecast:
    """A value in the period after the log.

    Attributes:
        name: of the period: the next week.
        value, interval: mean, and interval at the stated confidence.
        simultaneous: interval at the confidence of the verdict; None where none rests on it.
        half_life: periods after which a row counts half; None where all count alike.
    """

    name: str
    value: float
    interval: Interval
    simultaneous: Interval | None = None
    half_life: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "period": self.name,
            "value": self.value,
            "interval": self.interval.to_dict(),
            "simultaneous": None if self.simultaneous is None else self.simultaneous.to_dict(),
            "half_life": self.half_life,
        }


@dataclass(frozen=True)
class DriftSeries:
    """A value by period, and what is said about its change.

    Attributes:
        name: what it is the value of, for sentences.
        values, std_errors: by period; the errors by the noise of rows.
        p: of no change, adjusted for all tests of the evaluation. drifts: whether it is below
            alpha.
        forecast: None for what is not forecast, or where the log cannot carry it.
    """

    name: str
    values: tuple[float, ...]
    std_errors: tuple[float, ...]
    p: float
    drifts: bool
    forecast: Forecast | None = None

    @property
    def extremes(self) -> tuple[int, int]:
        """The two periods that a sentence compares: the first and the last, or where these are
        alike in spite of a drift, the lowest and the highest, in their order."""
        last = len(self.values) - 1
        gap = abs(self.values[last] - self.values[0])
        if not self.drifts or gap > self.std_errors[0] + self.std_errors[last]:
            return 0, last
        order = sorted(range(last + 1), key=self.values.__getitem__)
        return min(order[0], order[-1]), max(order[0], order[-1])

    def to_dict(self) -> dict[str, Any]:
        return {
            "values": list(self.values),
            "std_errors": list(self.std_errors),
            "p": self.p,
            "drifts": self.drifts,
            "forecast": None if self.forecast is None else self.forecast.to_dict(),
        }


@dataclass(frozen=True)
class PolicyOverTime:
    """The series of a policy.

    Attributes:
        value: by the deciding estimator. difference: to the logging policy.
        weight: mean importance weight, 1 in every period for true propensities.
        overlap: mean of w / (1 + w), which moves where the logging policy or the contexts change
            under the policy; its drift is no fault.
    """

    value: DriftSeries
    difference: DriftSeries
    weight: DriftSeries
    overlap: DriftSeries

    def to_dict(self) -> dict[str, Any]:
        return {
            "value": self.value.to_dict(),
            "difference": self.difference.to_dict(),
            "weight": self.weight.to_dict(),
            "overlap": self.overlap.to_dict(),
        }


@dataclass(frozen=True)
class TimeResult:
    """Values over time of one evaluation.

    Attributes:
        unit: name of a period. periods: in order; empty where `reason` says why.
        alpha: error over all tests for drift of this evaluation.
        logging: the logging policy's value.
        policies: by name.
        correlation_p: of "rows are independent given their time", adjusted.
        correlated: whether all intervals are widened for correlation in time.
        seasons: cycles that are accounted for.
        reason: why there are no periods, or no forecast; None where there are both.
    """

    unit: str = ""
    periods: tuple[Period, ...] = ()
    alpha: float = 0.05
    logging: DriftSeries | None = None
    policies: dict[str, PolicyOverTime] = field(default_factory=dict)
    correlation_p: float | None = None
    correlated: bool = False
    seasons: tuple[str, ...] = ()
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "periods": [asdict(one) for one in self.periods],
            "alpha": self.alpha,
            "logging": None if self.logging is None else self.logging.to_dict(),
            "policies": {name: one.to_dict() for name, one in self.policies.items()},
            "correlation_p": self.correlation_p,
            "correlated": self.correlated,
            "seasons": list(self.seasons),
            "reason": self.reason,
        }

    def sentence(self, series: DriftSeries, show: Show = _four_digits) -> str:
        """How a series changed, and its forecast, in plain words; show: a value as text."""
        text, found = self.change(series, show), series.forecast
        if found is not None:
            low, high = show(found.interval.low), show(found.interval.high)
            text += f"; an estimate for {found.name} is {show(found.value)} [{low}, {high}]"
        return text

    def change(self, series: DriftSeries, show: Show = _four_digits) -> str:
        """How a series changed, in plain words."""
        first, last = series.extremes
        names = [one.name for one in self.periods]
        before, after = series.values[first], series.values[last]
        if not series.drifts:
            text = f"no change of {series.name} was found (p = {_p(series.p)})"
            if not math.isfinite(series.std_errors[first] + series.std_errors[last]):
                return f"{text}: too few rows are close in time to know their noise"
            before_text, after_text = (
                f"{show(series.values[i])} ± {show(2.0 * series.std_errors[i])}"
                for i in (first, last)
            )
            return f"{text}: {before_text} in {names[first]} and {after_text} in {names[last]}"
        word = "fell" if after < before else "rose"
        return (
            f"{series.name} {word} from {show(before)} in {names[first]} to {show(after)} in "
            f"{names[last]} (p = {_p(series.p)})"
        )

    def sentences(self, policy: str, show: Show = _four_digits) -> list[str]:
        """What a report says about a policy first: its values, what else changed, correlation, and
        what cannot be said."""
        said = []
        one = self.policies.get(policy)
        if one is not None:
            said.append(self.sentence(one.value, show))
            if one.difference.drifts:
                said.append(self.sentence(one.difference, show))
            if one.weight.drifts:
                said.append(
                    f"{self.change(one.weight)}: logged probabilities are wrong in some periods"
                )
            if one.overlap.drifts:
                said.append(f"{self.change(one.overlap)}: the logging policy or contexts changed")
        if self.correlated:
            p = self.correlation_p
            said.append(
                f"rows that are close in time are correlated (p = {_p(p)}): the intervals of "
                "values over the log are widened for it"
                if p is not None and p < FOUND
                else "the intervals of values over the log are widened for rows that are "
                "correlated in time, since evaluation.time.correlated is set"
            )
        if self.reason is not None:
            said.append(self.reason)
        return said


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else "0.0001 or less"
