"""Where passes over parts run, and where their progress is reported."""

from __future__ import annotations

from dataclasses import dataclass, field

from offtower.mapping import Mapper
from offtower.progress import Progress


@dataclass(frozen=True)
class Execution:
    """How a long function runs: by default in this process, without reports."""

    mapper: Mapper = field(default_factory=Mapper)
    """Runs the parts; results and written files have the same bits with any."""
    progress: Progress = field(default_factory=Progress)


LOCAL = Execution()
