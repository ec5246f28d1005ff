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

    def reload(self) -> bool:
        """Serve the version that is current now; return whether it is another one.

        Requests that were read for the earlier version are still answered by it.

        Raises:
            RunError: the new version cannot be opened; the earlier one stays.
        """
        with self._lock:
            if find_version(self.path) == self.opened.retriever.directory:
                return False
            before = self.opened.retriever.version
            self.opened = OpenExport.open(self.path)
            after = self.opened.retriever.version
            logger.info("serving export %s instead of %s", after, before)
            return after != before
