"""What an epoch's metrics line is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offtower.training.step import StepMeasures


@dataclass
class EpochSums:
    """Sums over the rows of an epoch so far; they go into checkpoints."""

    rows: float = 0
    loss: float = 0.0
    value: float = 0.0
    seconds: float = 0.0
    seconds_waiting: float = 0.0
    last: dict[str, float | None] | None = None

    @classmethod
    def restore(cls, content: dict[str, Any] | None) -> EpochSums:
        return cls(**content) if content else cls()

    def add(self, rows: int, loss: float, value: float) -> None:
        self.rows += rows
        self.loss += loss * rows
        self.value += value * rows

    @property
    def mean_value(self) -> float:
        return self.value / max(self.rows, 1)


def measures_line(measures: StepMeasures | None) -> dict[str, float | None]:
    """The measures' names and numbers; null where nothing was measured. `divergence` is there where
    a logging policy is known."""
    if measures is None:
        return {"effective_sample_size": None, "largest_weight": None, "entropy": None}
    line = asdict(measures)
    if measures.divergence is None:
        line.pop("divergence")
    return line
