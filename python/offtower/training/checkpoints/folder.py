"""The folder of a run's checkpoints: names of steps, and which of them stay."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from offtower.checksums import read_checked_json
from offtower.errors import RunError

_STEP = re.compile(r"step_([0-9]{12})")
_BEST = re.compile(r"best_[0-9]{12}")


@dataclass(frozen=True)
class CheckpointFolder:
    """Checkpoints by step, and policies at the best validation so far.

    Attributes:
        path: the run's `checkpoints` folder.
        kept: how many of the newest stay.
    """

    path: Path
    kept: int

    def steps(self) -> list[Path]:
        """Checkpoints in the order of their steps."""
        return sorted(p for p in self.path.iterdir() if self.is_checkpoint(p))

    def step(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.path / f"step_{step:012d}"

    def best(self, step: int) -> Path:
        """Where the best policy of a step lies."""
        return self.path / f"best_{step:012d}"

    def is_checkpoint(self, path: Path) -> bool:
        """Whether a path has the name of a checkpoint, not of a best policy."""
        return _STEP.fullmatch(path.name) is not None

    def prune(self, written: Path) -> None:
        """Remove the checkpoints and best policies that a new checkpoint replaces."""
        paths = self.steps()
        # Later steps are damaged, or were written by a process that no longer owns the run.
        for later in paths[paths.index(written) + 1 :]:
            shutil.rmtree(later, ignore_errors=True)
        paths = paths[: paths.index(written) + 1]
        for earlier in paths[: -self.kept]:
            shutil.rmtree(earlier, ignore_errors=True)
        needed = set()
        for one in paths[-self.kept :]:
            try:
                state = read_checked_json(one / "state.json")
                needed.add(state["progression"]["best_step"])
            except (OSError, RunError, KeyError, TypeError):
                continue
        names = {self.best(step).name for step in needed if step is not None}
        for one in self.path.iterdir():
            if _BEST.fullmatch(one.name) and one.name not in names:
                shutil.rmtree(one, ignore_errors=True)
