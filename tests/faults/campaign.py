"""Inject faults one at a time, and count what happens by kind of file."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from offtower.errors import OfftowerError
from tests.faults.damage import Fault
from tests.faults.world import Subject


class Outcome(Enum):
    """What reading a damaged file does."""

    REFUSED = "refused, file or folder named"
    REPORTED = "reported in a warning"
    HARMLESS = "same result"
    UNNAMED = "refused, not named"
    SILENT = "silent change"
    TRACEBACK = "traceback"


BAD = (Outcome.UNNAMED, Outcome.SILENT, Outcome.TRACEBACK)


@dataclass(frozen=True)
class Injection:
    """One fault and what came of it."""

    subject: str
    file: str
    fault: Fault
    outcome: Outcome
    message: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.file}, {self.fault}: {self.outcome.value}: {self.message}"


def inject(root: Path, subject: Subject, path: Path, fault: Fault, wanted: object) -> Injection:
    """Damage one file, read it, and put it back.

    Args:
        wanted: what `subject.read` gives without damage.
    """
    content = path.read_bytes()
    damaged = fault.apply(content)
    with subject.restored(root), _Warnings() as said:
        path.write_bytes(damaged)
        try:
            found = subject.read(root)
        except OfftowerError as error:
            message = str(error)
            outcome = Outcome.REFUSED if _names(message, root, path) else Outcome.UNNAMED
        except Exception as error:
            message, outcome = f"{type(error).__name__}: {error}", Outcome.TRACEBACK
        else:
            message = "; ".join(said.messages)
            if found == wanted:
                outcome = Outcome.HARMLESS
            else:
                outcome = Outcome.REPORTED if _names(message, root, path) else Outcome.SILENT
    path.write_bytes(content)
    return Injection(subject.name, str(path.relative_to(root)), fault, outcome, message[:500])


def campaign(
    root: Path, subjects: Sequence[Subject], number: int, seed: int
) -> Iterator[Injection]:
    """`number` random faults, spread evenly over the kinds and then over their files."""
    rng = np.random.default_rng(seed)
    wanted: dict[str, object] = {}
    for index in range(number):
        subject = subjects[index % len(subjects)]
        if subject.name not in wanted:
            with subject.restored(root):
                wanted[subject.name] = subject.read(root)
        paths = [path for path in subject.paths(root) if path.stat().st_size]
        path = paths[int(rng.integers(len(paths)))]
        fault = Fault.draw(rng, path.stat().st_size)
        yield inject(root, subject, path, fault, wanted[subject.name])


def table(found: Sequence[Injection]) -> str:
    """Counts by kind of file and outcome, as a Markdown table."""
    counts = Counter((one.subject, one.outcome) for one in found)
    lines = [
        "| kind of file | faults | " + " | ".join(one.value for one in Outcome) + " |",
        "|---|" + "---:|" * (1 + len(Outcome)),
    ]
    for subject in dict.fromkeys(one.subject for one in found):
        row = [counts[subject, outcome] for outcome in Outcome]
        lines.append(f"| {subject} | {sum(row)} | " + " | ".join(map(str, row)) + " |")
    row = [sum(one.outcome is outcome for one in found) for outcome in Outcome]
    lines.append(f"| **all** | {sum(row)} | " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def _names(message: str, root: Path, path: Path) -> bool:
    """Whether a message has the file, or a folder of it that is not the whole world's."""
    folders = [path, *path.parents]
    below = folders[: folders.index(root)]
    return any(str(one) in message for one in below) or path.parent.name in message


class _Warnings(logging.Handler):
    """Collects what offtower logs as warnings, and silences those of libraries."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        self._catcher = warnings.catch_warnings()
        self._catcher.__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("offtower").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("offtower").removeHandler(self)
        self._catcher.__exit__(None, None, None)
