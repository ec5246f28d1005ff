"""Progress reports of long-running functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar


class Progress:
    """Ignores all reports; the command line overrides the methods to draw bars."""

    def start(self, task: str, total: int | None) -> None:
        """Begin a task of `total` units of work, or of unknown length."""

    def advance(self, amount: int, note: str = "") -> None:
        """Add to the finished units; `note` is shown beside the bar."""

    def finish(self) -> None:
        """End the current task."""


class _Rows(Protocol):
    @property
    def rows(self) -> int: ...


R = TypeVar("R", bound=_Rows)


def report_rows(results: Iterable[R], progress: Progress) -> Iterator[R]:
    """Yield `results`, and report the `rows` of each as done."""
    for result in results:
        progress.advance(result.rows)
        yield result
