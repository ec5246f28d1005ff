"""Progress reports of long-running functions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
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

    def note(self, message: str) -> None:
        """Report a line that stays, such as the next stage of a long function."""


_PLAIN_SECONDS = 30.0
"""Between two lines of progress where standard error is not a terminal."""


class DrawnProgress(Progress):
    """Progress bars on standard error if it is a terminal; else a line every half minute."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._task: Any = None
        self._plain: PlainTask | None = None
        self._last = time.monotonic()

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def start(self, task: str, total: int | None) -> None:
        self.finish()
        if not sys.stderr.isatty():
            self._plain = PlainTask(task, total, last=self._last)
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
        elif self._plain is not None:
            line = self._plain.advance(amount, note)
            if line is not None:
                self._last = self._plain.last
                self.note(line)

    def finish(self) -> None:
        self._plain = None
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class PlainTask:
    """Progress of one task as lines of text.

    Args:
        task: its name.
        total: units of work; None where they are not known.
        every: seconds between two lines.
        clock: returns seconds.
        last: time of the line before this task, so that many short tasks have lines too; None: now.
    """

    def __init__(
        self,
        task: str,
        total: int | None,
        every: float = _PLAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        last: float | None = None,
    ) -> None:
        self._name, self._total, self._every, self._clock = task, total, every, clock
        self._done = 0
        self._began = clock()
        self.last = self._began if last is None else last

    def advance(self, amount: int, note: str = "") -> str | None:
        """Add finished units; return a line where one is due, with `note` at its end."""
        self._done += amount
        now = self._clock()
        if now - self.last < self._every:
            return None
        self.last = now
        note = f"; {note}" if note else ""
        if not self._total or not self._done:
            return f"{self._name}: {self._done:,} done{note}"
        left = (now - self._began) * max(self._total - self._done, 0) / self._done
        return f"{self._name}: {self._done / self._total:.0%}, about {duration(left)} left{note}"


def duration(seconds: float) -> str:
    """Seconds below two minutes, else minutes."""
    return f"{seconds:.0f} s" if seconds < 120.0 else f"{seconds / 60.0:.0f} min"


class _Rows(Protocol):
    @property
    def rows(self) -> int: ...


R = TypeVar("R", bound=_Rows)


def report_rows(results: Iterable[R], progress: Progress) -> Iterator[R]:
    """Yield `results`, and report the `rows` of each as done."""
    for result in results:
        progress.advance(result.rows)
        yield result
