"""Progress of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offtower.data.order import Cursor


@dataclass
class Progression:
    """Counters of a run. Random numbers need no state: they are functions of seed and cursor."""

    cursor: Cursor
    step: int = 0
    rows: int = 0
    best_step: int | None = None
    best_score: float | None = None
    """Largest lower end of an interval of one validation: that at `best_step`."""
    best_low: float | None = None
    """Lower bound of the value at `best_step` that holds for all validations at once."""
    validations_without_gain: int = 0
    finished: bool = False
    metrics_lines: int = 0
    """Lines of metrics.jsonl so far."""
    epoch_sums: dict[str, float] | None = None
    """Running sums of the current epoch, for its metrics line after a resumption."""

    @property
    def epoch_ends(self) -> bool:
        """Whether all steps of the epoch before the cursor's are done, but not its validation."""
        at_start = self.cursor.window == self.cursor.batch == 0
        return at_start and self.epoch_sums is not None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Progression:
        known = dict(content)
        return cls(cursor=Cursor(**known.pop("cursor")), **known)
