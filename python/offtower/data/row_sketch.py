"""A sketch of a log's rows, which finds the rows that two logs share whatever files hold them.

It holds the smallest distinct hashes of the rows' contents and how often each occurs (bottom-k:
Cohen and Kaplan 2007). Below the smaller of two sketches' largest hashes both are complete, so that
what they share there is a random sample of what the logs share.

Equal rows also occur in independent logs of few distinct rows. The chance that a further row of the
same source equals one of a log is 1 - (rows that occur once) / rows (Good 1953), and only a share
beyond it shows copies.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.row_keys import Keys, row_keys
from offtower.data.schema import LogSchema

SIZE = 2048
"""Hashes that are kept of a log."""
_ERRORS = 4.0
"""A share is reported if it exceeds that of chance by so many of its standard errors by chance."""
_LEAST_SHARED = 3
_HASHES = "2"
"""Of the definition of rows' hashes: sketches of different ones cannot be compared."""


@dataclass(frozen=True)
class SharedRows:
    """An estimated share of a log's rows that another log holds too, beyond chance.

    std_error: of the share.
    """

    share: float
    std_error: float

    @property
    def text(self) -> str:
        if self.share > 0.995:
            return "its rows"
        return f"{self.share:.2g} +- {self.std_error:.1g} of its rows"


@dataclass(frozen=True, eq=False)
class RowSketch:
    """The smallest hashes of a log's rows.

    Attributes:
        key: (g,) sorted distinct hashes, at most `SIZE`. times: (g,) rows with each.
    """

    key: Keys
    times: NDArray[np.int64]

    @classmethod
    def empty(cls) -> RowSketch:
        return cls(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64))

    @classmethod
    def of(cls, tables: Iterable[pa.Table], schema: LogSchema) -> RowSketch:
        """The sketch of some rows, which have the columns `sketched_columns`."""
        found = cls.empty()
        for table in tables:
            found = found.with_rows(table, schema)
        return found

    def with_rows(self, table: pa.Table, schema: LogSchema) -> RowSketch:
        """The sketch with further rows."""
        return self.with_keys(sketched_keys(table, schema))

    def with_keys(self, keys: Keys) -> RowSketch:
        """The sketch with further rows, by their hashes (`sketched_keys`)."""
        if self.key.size == SIZE:
            keys = keys[keys <= self.key[-1]]
        key, times = np.unique(keys, return_counts=True)
        return self.merge(RowSketch(key, times))

    def merge(self, other: RowSketch) -> RowSketch:
        """The sketch of both logs' rows."""
        key, where = np.unique(np.concatenate([self.key, other.key]), return_inverse=True)
        times = np.bincount(where, np.concatenate([self.times, other.times]), minlength=key.size)
        return RowSketch(key[:SIZE], times[:SIZE].astype(np.int64))

    def shared(self, other: RowSketch) -> SharedRows | None:
        """The share of these rows that the other log holds too; None where it may be chance."""
        ends = [int(one.key[-1]) for one in (self, other) if one.key.size == SIZE]
        end = np.uint64(min(ends, default=2**64 - 1))
        mine, theirs = self.key <= end, other.key <= end
        times, rows = self.times[mine], int(self.times[mine].sum())
        hit = times[np.isin(self.key[mine], other.key[theirs])]
        seen = int(other.times[theirs].sum())
        if hit.size < _LEAST_SHARED or not seen:
            return None
        chance = 1.0 - np.count_nonzero(other.times[theirs] == 1) / seen
        share = float(hit.sum()) / rows
        least = max(chance, 1.0 / seen)
        if not share - chance > _ERRORS * math.sqrt(least * (1.0 / rows + 1.0 / seen)):
            return None
        # Of distinct rows; one more on each side, so that a share of 1 has an error too.
        kept = (hit.size + 1.0) / (times.size + 2.0)
        error = math.sqrt(kept * (1.0 - kept) / times.size + chance * (1.0 - chance) / seen)
        return SharedRows((share - chance) / (1.0 - chance), error / (1.0 - chance))

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return {
            "hashes": _HASHES,
            "key": packed(self.key, "<u8"),
            "times": packed(self.times, "<i4"),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any] | None) -> RowSketch | None:
        """The sketch of `to_dict`; None without one, or of an earlier version's hashes."""
        if content is None or content.get("hashes") != _HASHES:
            return None
        key, times = unpacked(content["key"], "<u8"), unpacked(content["times"], "<i4")
        return cls(key.astype(np.uint64), times.astype(np.int64))


def sketched_columns(schema: LogSchema) -> tuple[str, ...]:
    """Columns of which a row's hash is made: all that describe a decision and its reward. Ids of
    rounds are left out, since a copy may number them anew."""
    named = [spec.source for spec in schema.context]
    named += [schema.action, *schema.reward_columns]
    others = (schema.pscore, schema.timestamp, schema.position, schema.user_id)
    return tuple(dict.fromkeys([*named, *(name for name in others if name is not None)]))


def sketched_keys(table: pa.Table, schema: LogSchema) -> Keys:
    """(n,) hashes of rows that have the columns `sketched_columns`."""
    # Without a sum of named rewards, which is made when rows are read.
    names = [name for name in sketched_columns(schema) if name in table.column_names]
    return row_keys(table, names, exact=False)


def packed(values: NDArray[Any], kind: str) -> str:
    """An array as text of a NumPy type."""
    return base64.b64encode(values.astype(kind).tobytes()).decode()


def unpacked(text: str, kind: str) -> NDArray[Any]:
    """The array of `packed`."""
    return np.frombuffer(base64.b64decode(text), dtype=kind)
