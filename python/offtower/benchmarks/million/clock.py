"""The time that a learner may train, and what it did in it."""

from __future__ import annotations

import time


class BudgetSpent(Exception):
    """The seconds of training are spent."""


class Clock:
    """Counts seconds from its creation, and rows of training steps."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.rows = 0
        self._began = time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the creation."""
        return time.perf_counter() - self._began

    @property
    def over(self) -> bool:
        return self.spent > self.seconds

    def facts(self) -> dict[str, float]:
        """Return rows per second, if any were counted."""
        return {"rows_per_second": self.rows / self.spent} if self.rows else {}
