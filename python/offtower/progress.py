"""Progress as the long-running parts report it; the command line draws it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar


class Progress:
    """Does nothing; a drawing one overrides the three methods."""

    def start(self, task: str, total: int | None) -> None:
        """A new task begins; `total` units of work, or None where unknown."""

    def advance(self, amount: int, note: str = "") -> None:
        """So much more of the current task is done; `note` is shown beside the bar."""

    def finish(self) -> None:
        """The current task is done."""


class _Rows(Protocol):
    @property
    def rows(self) -> int: ...


R = TypeVar("R", bound=_Rows)


def watched(results: Iterable[R], progress: Progress) -> Iterator[R]:
    """Hand results on, and count their `rows` as done."""
    for result in results:
        progress.advance(result.rows)
        yield result
