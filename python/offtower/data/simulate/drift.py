"""Worlds that change over the time of a log, and the values of policies at any of its times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from offtower.data.simulate.eligible_sets import START
from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.errors import ConfigError

WEEKS = 6
"""Length of a log that drifts."""
_DAY = np.timedelta64(86_400_000_000, "us")
MIDDLE = START + WEEKS * 7 // 2 * _DAY


@dataclass(frozen=True)
class DriftSettings:
    """How z(x, a) and the logging policy change over a log.

    z(x, a, t) = z(x, a) + h(t) d(a), with d(a) drawn from a normal distribution of mean -1 and
    variance 1, and h(t) the sum of the first three.

    Attributes:
        trend: h rises from 0 to this over the log.
        step: h rises by this in the middle of the log.
        week: h is this on Saturdays and Sundays.
        logging: factor of the logging policy's inverse temperature from the middle of the log on.
    """

    trend: float = 0.0
    step: float = 0.0
    week: float = 0.0
    logging: float = 1.0

    def amount(self, time: NDArray[np.datetime64]) -> NDArray[np.float64]:
        """h(t)."""
        since = (time - START).astype(np.float64)
        share = since / (WEEKS * 7 * _DAY.astype(np.float64))
        day = (time.astype("datetime64[D]").astype(np.int64) + 3) % 7
        moved = self.trend * share + self.step * (share >= 0.5) + self.week * (day >= 5)
        return np.asarray(moved, dtype=np.float64)

    def late(self, policy: LoggingPolicy) -> LoggingPolicy:
        """The logging policy from the middle of the log on."""
        return replace(policy, beta=self.logging * policy.beta)

    @staticmethod
    def times(first: int, count: int, rows: int) -> NDArray[np.datetime64]:
        """(count,) times of rows from number `first` on, of a log of `rows` in WEEKS weeks."""
        number = np.arange(first, first + count) + 0.5
        return START + (number * (WEEKS * 7 * _DAY.astype(np.int64) / rows)).astype(
            "timedelta64[us]"
        )

    @staticmethod
    def week_times(week: int, points: int = 7) -> NDArray[np.datetime64]:
        """Evenly spaced times of a week of the log, from 0; WEEKS is the week after it."""
        day = week * 7 + (np.arange(points) + 0.5) * (7 / points)
        return START + (day * _DAY.astype(np.float64)).astype("timedelta64[us]")


def parse_drift(texts: Sequence[str]) -> DriftSettings:
    """Parse FORM=NUMBER, each form once. Raises ConfigError for anything else."""
    known = [field.name for field in fields(DriftSettings)]
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if name not in known or name in found or not abs(value) < float("inf"):
            raise ConfigError(
                f"--drift '{text}' must be FORM=NUMBER with a form of {', '.join(known)}, each once"
            )
        found[name] = value
    return DriftSettings(**found)
