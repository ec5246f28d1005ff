"""The ledger of a log: what was learned from it, chosen on it and evaluated on it.

`LOG/_ledger/000007.json` is entry 7. Entries are only ever appended: an entry is a file that one
process creates (`lease_files`) and none rewrites, with a checksum of its content. It holds the
identity of the log's content, so that a copy of the folder keeps its entries, and rows that replace
the log's begin without any. Names with a leading underscore are no part of a log, so entries do not
change its fingerprint. The ledger of a log that is a single file is in that file's folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from offtower.checksums import add_checksum, check_json, parse_json
from offtower.data.content import LogContent, is_same
from offtower.data.lease_files import open_exclusive_files
from offtower.data.location import AnyPath, Location
from offtower.errors import DataError

logger = logging.getLogger("offtower.ledger")

FOLDER = "_ledger"
_NAME = re.compile(r"([0-9]{6,})\.json")
_ATTEMPTS = 100
_REMEDY = (
    "Restore it from a copy; or remove the folder, and earlier looks at this log are not counted"
)
_READERS = 16
"""Entries of a store that are read at the same time."""


@dataclass(frozen=True)
class LedgerEntry:
    """One event in the life of a log.

    Attributes:
        number: from 1, in the order of the events.
        kind: "trained", "validated", "tuned", "served", "question", "evaluated" or "verdict".
        log: identity of the log's content.
        when: UTC, ISO 8601.
        facts: depend on the kind.
    """

    number: int
    kind: str
    log: str
    when: str
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "kind": self.kind,
            "log": self.log,
            "when": self.when,
            "facts": dict(self.facts),
        }


Facts = Callable[[tuple[LedgerEntry, ...]], Mapping[str, Any] | None]
"""The facts of an entry, given all earlier ones of the same log; None where none is needed."""


class Ledger:
    """Entries in memory."""

    def __init__(self) -> None:
        self._kept: list[LedgerEntry] = []

    def entries(self, *logs: str) -> tuple[LedgerEntry, ...]:
        """The entries about a log's content, or about any of several, in their order.

        Raises:
            DataError: an entry is damaged or missing.
        """
        return _about(logs, self._all())

    def earlier_contents(self, log: LogContent) -> tuple[str, ...]:
        """Identities of recorded contents that hold at least half of this log's files, besides its
        own: the log before files were added or removed."""
        found = {
            entry.log
            for entry in self._all()
            if "files" in entry.facts
            and not is_same(entry.log, log.fingerprint)
            and 2 * log.shared_files(entry.facts["files"]) >= len(log.files)
        }
        return tuple(sorted(found))

    def append(
        self, log: str, kind: str, facts: Facts, also: tuple[str, ...] = ()
    ) -> LedgerEntry | None:
        """Append an entry, whose facts follow from the earlier ones, also with several writers.

        Args:
            also: further contents whose entries `facts` is given.

        Raises:
            DataError, OSError: the ledger cannot be read or written.
        """
        for _ in range(_ATTEMPTS):
            known = self._all()
            found = facts(_about((log, *also), known))
            if found is None:
                return None
            number = known[-1].number + 1 if known else 1
            when = datetime.now(UTC).isoformat(timespec="seconds")
            entry = LedgerEntry(number, kind, log, when, found)
            if self._create(entry):
                return entry
        raise DataError(
            f"no entry could be appended to {self}: other processes append all the time"
        )

    def _all(self) -> list[LedgerEntry]:
        return list(self._kept)

    def _create(self, entry: LedgerEntry) -> bool:
        self._kept.append(entry)
        return True

    def __str__(self) -> str:
        return "the ledger in memory"


def _about(logs: tuple[str, ...], entries: list[LedgerEntry]) -> tuple[LedgerEntry, ...]:
    return tuple(entry for entry in entries if any(is_same(entry.log, log) for log in logs))


class LogLedger(Ledger):
    """The ledger in the folder of a log."""

    def __init__(self, log: AnyPath) -> None:
        super().__init__()
        place = Location.of(log)
        folder = place.parent if place.kind() == "file" else place
        self.place = folder / FOLDER
        self._files = open_exclusive_files(self.place)

    def _all(self) -> list[LedgerEntry]:
        names = [name for name in self._files.names() if _NAME.fullmatch(name)]
        names.sort(key=lambda name: int(name.partition(".")[0]))
        fresh = names[len(self._kept) :]
        if self._files.remote and len(fresh) > 1:
            with ThreadPoolExecutor(_READERS) as readers:
                self._kept += readers.map(self._read, fresh)
        else:
            self._kept += map(self._read, fresh)
        for number, entry in enumerate(self._kept, start=1):
            if entry.number != number:
                raise DataError(
                    f"entry {number} of the ledger at '{self.place}' is missing: entries are never "
                    f"removed. {_REMEDY}"
                )
        return list(self._kept)

    def _read(self, name: str) -> LedgerEntry:
        path = self.place / name
        try:
            text = parse_json(self._files.read(name), path, DataError)
            return LedgerEntry(**check_json(text, path, DataError))
        except (DataError, TypeError) as error:
            raise DataError(f"'{path}' is no entry of a ledger ({error}). {_REMEDY}") from error

    def _create(self, entry: LedgerEntry) -> bool:
        if self.place.local is not None:
            if self.place.local.is_symlink():
                raise DataError(f"'{self.place}' is a symbolic link; remove it")
            self.place.local.mkdir(exist_ok=True)
        text = json.dumps(add_checksum(entry.to_dict()), indent=1) + "\n"
        return self._files.create(f"{entry.number:06d}.json", text.encode())

    def __str__(self) -> str:
        return f"the ledger at '{self.place}'"


def record(log: AnyPath, content: str, kind: str, facts: Mapping[str, Any]) -> None:
    """Append an entry to a log's ledger unless it is there; warn where that is not possible.

    Args:
        log: where it is.
        content: its identity.
    """

    def unless_there(entries: tuple[LedgerEntry, ...]) -> Mapping[str, Any] | None:
        known = any(entry.kind == kind and entry.facts == facts for entry in entries)
        return None if known else facts

    try:
        LogLedger(log).append(content, kind, unless_there)
    except (DataError, OSError) as error:
        logger.warning(
            "the ledger of the log at '%s' could not record that it was used (%s: %s): evaluations "
            "elsewhere will not count this use",
            log,
            kind,
            error,
        )
