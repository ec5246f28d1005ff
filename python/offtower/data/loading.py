"""Loading of row groups: read, checked and encoded, in the requested order."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.data.catalogue import Catalogue
from offtower.data.check import RowChecker
from offtower.data.eligible import EligibleItems, eligible_items
from offtower.data.encoded_cache import EncodedCache
from offtower.data.encoding import FeatureEncoding, concat
from offtower.data.location import AnyPath
from offtower.data.log import Log
from offtower.data.rows import COLUMNS, EncodedRows, encode_rows, joined_column


@contextmanager
def closing_tables(tables: Iterator[pa.Table]) -> Iterator[None]:
    """Close an iterator with threads of its own, even while another thread waits for it."""
    try:
        yield
    finally:
        close = getattr(tables, "close", None)
        if close is not None:
            close()


class Loader:
    """Reads, checks and encodes row groups.

    Args:
        log: the log.
        catalogue: the items.
        context_encoding: fitted encoding of the context features.
        quarantine: folder for bad rows, which are left out; without one the first raises
            BadRowsError.
        cache: keeps encoded row groups for later epochs.
        sketched: also hash the rows' contents.
    """

    def __init__(
        self,
        log: Log,
        catalogue: Catalogue,
        context_encoding: FeatureEncoding,
        quarantine: AnyPath | None = None,
        cache: EncodedCache | None = None,
        *,
        sketched: bool = False,
    ) -> None:
        self.log = log
        self._cache = cache or EncodedCache(0)
        self._catalogue = catalogue
        self._encoding = context_encoding
        self._sketched = sketched
        self._first_rows = log.first_rows
        self._checker = RowChecker(log.schema, catalogue, quarantine=quarantine)

    @property
    def bad_rows(self) -> int:
        return self._checker.bad_rows

    @property
    def eligible(self) -> EligibleItems | None:
        """The items' side of the rows' eligible items."""
        return eligible_items(self._catalogue, self.log.schema)

    def tables(self, windows: Sequence[Sequence[int]]) -> Iterator[pa.Table]:
        """Read the row groups of some windows that are not in the cache, for `load`; those of a
        store are read ahead."""
        groups = [group for window in windows for group in window if group not in self._cache]
        return self.log.read_row_groups(groups, self.log.schema.columns)

    def load(
        self, groups: Sequence[int], tables: Iterator[pa.Table], stop: threading.Event
    ) -> EncodedRows | None:
        """Encode the rows of some row groups; None if `stop` is set meanwhile."""
        parts = []
        for group in groups:
            if stop.is_set():
                return None
            if group not in self._cache:
                rows = self._encoded(group, next(tables))
                self._cache.put(group, rows)
                parts.append(rows)
            else:
                parts.append(self._cache.get(group))
        rows = concat_rows(parts)
        # Arrow would keep the memory of a whole window for the next tables.
        pa.default_memory_pool().release_unused()
        return rows

    def _encoded(self, group: int, table: pa.Table) -> EncodedRows:
        schema = self.log.schema
        first_row = int(self._first_rows[group])
        good = self._checker.good_rows(table, self.log.location(group), first_row)
        row = None
        if not good.all():
            row = first_row + np.flatnonzero(good)
            table = table.filter(pa.array(good))
        return encode_rows(
            table, schema, self._catalogue, self._encoding, first_row, row, sketched=self._sketched
        )


def concat_rows(parts: list[EncodedRows]) -> EncodedRows:
    """Concatenate rows, emptying `parts` column by column to save memory."""
    if len(parts) == 1:
        return parts.pop()
    kind = parts[0].pscore_kind
    names = ("context", *COLUMNS)
    columns: list[dict[str, Any]] = [{name: getattr(p, name) for name in names} for p in parts]
    parts.clear()
    joined: dict[str, Any] = {}
    contexts = [column.pop("context") for column in columns]
    joined["context"] = {
        name: concat([{name: context.pop(name)} for context in contexts])[name]
        for name in list(contexts[0])
    }
    for name in list(columns[0]):
        values = [column.pop(name) for column in columns]
        joined[name] = joined_column(values)
    return EncodedRows(pscore_kind=kind, **joined)
