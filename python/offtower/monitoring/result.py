"""What a monitoring says: checks against thresholds, and values by day."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

EXIT_OK, EXIT_BREACHED = 0, 1


@dataclass(frozen=True)
class Check:
    """A number against its threshold.

    Attributes:
        name: of the kind; subject: the feature or the day; empty for the whole log.
        value: measured. low, high: its bounds; None where there is none.
        threshold: None where none is set.
        breached: whether the bounds are beyond the threshold.
        text: what was found, in a sentence.
    """

    name: str
    subject: str
    value: float
    threshold: float | None
    breached: bool
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Day:
    """A day of the log; the bounds of all days hold at once, at all readings.

    Attributes:
        name: its first time. rows: of it; units: independent rounds.
        value, value_low, value_high: mean reward.
        weight, weight_low, weight_high: mean weight of the rows whose weight was computed; None
            without such rows, and weight_high where a weight exceeds monitor.max_weight.
    """

    name: str
    rows: int
    units: int
    value: float
    value_low: float
    value_high: float
    weight: float | None = None
    weight_low: float | None = None
    weight_high: float | None = None


@dataclass(frozen=True)
class MonitorReport:
    """A monitoring of a log.

    Attributes:
        run, log: their paths. rows, units: read rows, and independent rounds among the good ones.
        alpha: error over all checks.
        notes: what could not be checked, and why.
    """

    run: str
    log: str
    rows: int
    units: int
    alpha: float
    checks: tuple[Check, ...]
    days: tuple[Day, ...]
    notes: tuple[str, ...] = ()

    @property
    def breached(self) -> tuple[Check, ...]:
        """The checks that breach their thresholds."""
        return tuple(one for one in self.checks if one.breached)

    @property
    def exit_code(self) -> int:
        """0 where no threshold is breached, else 1."""
        return EXIT_BREACHED if self.breached else EXIT_OK

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "breached": [f"{one.name} {one.subject}".strip() for one in self.breached],
            "exit_code": self.exit_code,
        }
