"""Progress as the long-running parts report it; the command line draws it."""

from __future__ import annotations


class Progress:
    """Does nothing; a drawing one overrides the three methods."""

    def start(self, task: str, total: int | None) -> None:
        """A new task begins; `total` units of work, or None where unknown."""

    def advance(self, amount: int, note: str = "") -> None:
        """So much more of the current task is done; `note` is shown beside the bar."""

    def finish(self) -> None:
        """The current task is done."""
