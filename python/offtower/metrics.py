"""metrics.jsonl: one JSON object per line, in step order, without duplicates after resuming."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offtower.atomic import write_text
from offtower.jsonable import finite
from offtower.tracking import Tracker

logger = logging.getLogger("offtower.metrics")

_CRC = "crc32"


class MetricsLog:
    """Append lines to a file, to memory and to trackers.

    Args:
        path: the file; None keeps lines in memory only.
        trackers: receive every line.
        before_write: called before the file is changed; may raise to prevent it.
    """

    def __init__(
        self,
        path: Path | None,
        trackers: Sequence[Tracker] = (),
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._trackers = tuple(trackers)
        self._before_write = before_write
        self.lines: list[dict[str, Any]] = []

    def resume_at(self, step: int, epoch: int, lines: int = 0) -> None:
        """Drop lines after `step`, which the resumed run writes again.

        The line of an epoch has the step of its last batch. It is kept for epochs before `epoch`,
        the current one: a run may have died between that line and its checkpoint. A warning is
        logged where fewer than `lines` are left.
        """
        self._before_write()
        if self._path is None or not self._path.exists():
            return
        kept = [line for line in read_metrics(self._path) if _kept(line, step, epoch)]
        _warn_of_missing(self._path, len(kept), lines)
        write_text(self._path, "".join(_to_text(line) for line in kept))
        self.lines = kept

    def restart(self) -> None:
        """Drop all lines."""
        self._before_write()
        self.lines = []
        if self._path is not None:
            write_text(self._path, "")

    def write(self, line: dict[str, Any]) -> None:
        self._before_write()
        self.lines.append(line)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_to_text(line))
        for tracker in self._trackers:
            tracker.write(line)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()

    def epochs(self) -> list[dict[str, Any]]:
        """Return the lines of epochs."""
        return [line for line in self.lines if line["kind"] == "epoch"]


def read_metrics(path: Path, wanted: int = 0) -> list[dict[str, Any]]:
    """Read a metrics file, without checksums.

    A damaged line, or an incomplete last one (of a killed run), is skipped with a warning; a file
    of fewer than `wanted` lines is reported in a warning too.
    """
    lines = []
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, start=1):
        line = _parsed(text)
        if line is not None:
            lines.append(line)
        elif text:
            logger.warning("'%s': line %d is damaged or incomplete, and left out", path, number)
    _warn_of_missing(path, len(lines), wanted)
    return lines


def _warn_of_missing(path: Path, found: int, wanted: int) -> None:
    if found < wanted:
        logger.warning("'%s' is damaged: it has %d of %d lines", path, found, wanted)


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text.decode("utf-8"))
        crc = line.pop(_CRC, None)
        whole = crc in (None, _crc(line))
        usable = isinstance(line["kind"], str) and line["step"] >= 0
        usable = usable and (line["kind"] != "epoch" or line["epoch"] >= 0)
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None
    return line if whole and usable else None


def _kept(line: dict[str, Any], step: int, epoch: int) -> bool:
    if line["kind"] == "epoch":
        return bool(line["epoch"] < epoch)
    return bool(line["step"] <= step)


def _to_text(line: dict[str, Any]) -> str:
    line = json.loads(json.dumps(finite(line)))
    return json.dumps({**line, _CRC: _crc(line)}) + "\n"


def _crc(line: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(line, sort_keys=True).encode()):08x}"
