"""metrics.jsonl: one JSON object a line, in step order, without repeats after a resumption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offtower.atomic import write_text
from offtower.jsonable import finite
from offtower.tracking import Tracker


class MetricsLog:
    """Appends lines; keeps them in memory too for the caller's history.

    Args:
        path: the file, or None to keep lines in memory only.
        trackers: get every line too.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        self._path = path
        self._trackers = tuple(trackers)
        self.lines: list[dict[str, Any]] = []

    def resume_at(self, step: int, epoch: int) -> None:
        """Keep what was written up to `step`; later lines will be written again.

        The line that closes an epoch has the step of its last batch. It is kept only for epochs
        before `epoch`, the one under way: a run may have died between that line and its checkpoint.
        """
        if self._path is None or not self._path.exists():
            return
        kept = [line for line in read_metrics(self._path) if _kept(line, step, epoch)]
        write_text(self._path, "".join(_to_text(line) for line in kept))
        self.lines = kept

    def restart(self) -> None:
        """Forget everything; a run begins."""
        self.lines = []
        if self._path is not None:
            write_text(self._path, "")

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_to_text(line))
        for tracker in self._trackers:
            tracker.write(line)

    def close(self) -> None:
        """The run has ended."""
        for tracker in self._trackers:
            tracker.close()

    def epochs(self) -> list[dict[str, Any]]:
        """The lines that close an epoch."""
        return [line for line in self.lines if line["kind"] == "epoch"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a half-written last line (a killed run) is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _kept(line: dict[str, Any], step: int, epoch: int) -> bool:
    if line["kind"] == "epoch":
        return bool(line["epoch"] < epoch)
    return bool(line["step"] <= step)


def _to_text(line: dict[str, Any]) -> str:
    return json.dumps(finite(line)) + "\n"
