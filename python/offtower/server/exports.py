"""The export that is served, and its replacement while requests are answered."""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from offtower.errors import OfftowerError
from offtower.retrieval import Retriever
from offtower.retrieval.manifest import find_version
from offtower.server.columns import ContextColumns

logger = logging.getLogger("offtower.server")


_Files = tuple[tuple[str, int, int], ...]
"""Name, size and time of change of each file of a folder."""


@dataclass(frozen=True, eq=False)
class OpenExport:
    """One version of an export; requests that were read for it are answered by it."""

    retriever: Retriever
    columns: ContextColumns

    @classmethod
    def open(cls, path: Path) -> OpenExport:
        """Open the current version, and answer one context, so that files that cannot be read are
        found before it replaces another, and its first requests do not wait for them.

        Raises:
            RunError: see `Retriever.open`.
        """
        retriever = Retriever.open(path)
        opened = cls(retriever, ContextColumns.of(retriever))
        # An empty context may be one that the policy cannot answer.
        with contextlib.suppress(OfftowerError):
            example = opened.columns.example()
            retriever.search(example, 1)
            retriever.sample(example, 1)
        return opened


class CurrentExport:
    """The version that `CURRENT` of a run names.

    Attributes:
        path: of the run, its export folder, or a version.
        opened: the version that is served.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened = OpenExport.open(path)
        self._lock = threading.Lock()
        self._refused: tuple[Path, _Files] | None = None

    @property
    def refused(self) -> str | None:
        """Name of the newer version that could not be opened."""
        return None if self._refused is None else self._refused[0].name

    def reload(self, *, again: bool = False) -> bool:
        """Serve the version that is current now; return whether it is another one.

        Requests that were read for the earlier version are still answered by it. A version that
        could not be opened is not tried again while its files stay the same.

        Args:
            again: try it in any case.

        Raises:
            RunError: the new version cannot be opened; the earlier one stays.
        """
        with self._lock:
            directory = find_version(self.path)
            if directory == self.opened.retriever.directory:
                self._refused = None
                return False
            found = (directory, _files(directory))
            if found == self._refused and not again:
                return False
            before = self.opened.retriever.version
            try:
                self.opened = OpenExport.open(self.path)
            except OfftowerError:
                self._refused = found
                raise
            self._refused = None
            after = self.opened.retriever.version
            logger.info("serving export %s instead of %s", after, before)
            return after != before


def _files(directory: Path) -> _Files:
    found = []
    for path in sorted(directory.rglob("*")):
        with contextlib.suppress(OSError):  # Another export may remove the version meanwhile.
            facts = path.stat()
            found.append((str(path), facts.st_size, facts.st_mtime_ns))
    return tuple(found)
