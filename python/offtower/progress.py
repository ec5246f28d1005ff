"""Progress reports of long-running functions."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bars


class Progress:
    """Ignores all reports."""

    def start(self, task: str, total: int | None) -> None:
        """Begin a task of `total` units of work, or of unknown length."""

    def advance(self, amount: int, note: str = "") -> None:
        """Add to the finished units; `note` is shown beside the bar."""

    def finish(self) -> None:
        """End the current task."""


class DrawnProgress(Progress):
    """Progress bars on standard error, if it is a terminal."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._task: Any = None

    def start(self, task: str, total: int | None) -> None:
        self.finish()
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._bars.start()
        self._task = self._bars.add_task(task, total=total, note="")

    def advance(self, amount: int, note: str = "") -> None:
        if self._bars is not None:
            self._bars.update(self._task, advance=amount, note=note)

    def finish(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class _Rows(Protocol):
    @property
    def rows(self) -> int: ...


R = TypeVar("R", bound=_Rows)


def report_rows(results: Iterable[R], progress: Progress) -> Iterator[R]:
    """Yield `results`, and report the `rows` of each as done."""
    for result in results:
        progress.advance(result.rows)
        yield result
