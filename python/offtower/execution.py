"""Where passes over parts run, where their progress is reported, and what may stop them."""

from __future__ import annotations

from dataclasses import dataclass, field

from offtower.interruption import Interruption
from offtower.mapping import Mapper
from offtower.progress import Progress


@dataclass(frozen=True)
class Execution:
    """How a long function runs: by default in this process, without reports."""

    mapper: Mapper = field(default_factory=Mapper)
    """Runs the parts; results and written files have the same bits with any."""
    progress: Progress = field(default_factory=Progress)
    interruption: Interruption = field(default_factory=Interruption)
    """May stop training, which then saves its work first."""


LOCAL = Execution()
