"""Bad rows, repeated rounds, and rows that stand twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from offtower.data.check import BadRow, count_faults, fault_remedy, first_bad_rows
from offtower.data.columns import hashed, splitmix64
from offtower.data.findings.base import Check, Finding, LogFacts, LogPart, rows_text
from offtower.data.findings.sketches import DuplicateCount
from offtower.data.row_keys import row_keys

_SHOWN_BAD_ROWS = 5
_DOUBLED_KEYS = 2_000_000


@dataclass(frozen=True)
class BadRows(Check):
    """The first bad values, the counts of all by (column, problem), and what to do about them."""

    first: tuple[BadRow, ...]
    counts: Counter[tuple[str, str]]
    remedies: tuple[str, ...]

    @classmethod
    def of(cls, part: LogPart) -> Self:
        if not part.faults:
            return cls((), Counter(), ())
        rows = first_bad_rows(part.table, part.faults, part.origin, part.first_row, _SHOWN_BAD_ROWS)
        remedy = fault_remedy(part.table, part.faults, part.schema)
        return cls(tuple(rows), count_faults(part.faults), (remedy,) if remedy else ())

    def merge(self, other: Self) -> Self:
        return type(self)(
            (self.first + other.first)[:_SHOWN_BAD_ROWS],
            self.counts + other.counts,
            (self.remedies + other.remedies)[:1],
        )

    def findings(self, facts: LogFacts) -> list[Finding]:
        if not self.counts:
            return [Finding("info", "rows", f"all {facts.rows:,} rows keep the schema")]
        kinds = "; ".join(
            f"{count:,} x column '{column}' is {problem}"
            for (column, problem), count in sorted(self.counts.items())
        )
        return [
            Finding(
                "error",
                "rows",
                f"bad values: {kinds}",
                {"bad": sum(self.counts.values())},
                remedy="".join(self.remedies),
            ),
            *(Finding("error", "row", str(row)) for row in self.first),
        ]


@dataclass(frozen=True)
class RepeatedRounds(Check):
    """Rows that repeat a (round, position)."""

    pairs: DuplicateCount | None

    @classmethod
    def of(cls, part: LogPart) -> Self:
        schema, good = part.schema, part.good
        if schema.round_id is None or schema.position is None:
            return cls(None)
        key = splitmix64(hashed(good.column(schema.round_id)))
        key = key ^ hashed(good.column(schema.position))
        return cls(DuplicateCount.of(key, row=part.row))

    def merge(self, other: Self) -> Self:
        if self.pairs is None or other.pairs is None:
            return self
        return type(self)(self.pairs.merge(other.pairs))

    def findings(self, facts: LogFacts) -> list[Finding]:
        pairs = self.pairs
        twice = 0 if pairs is None else pairs.count()
        if pairs is None or twice == 0:
            return []
        return [
            Finding(
                "error",
                "repeats",
                f"{'about ' if pairs.shift else ''}{twice:,} rows repeat a (round, position) "
                "that another row has",
                {"rows": twice},
                rows_text(pairs.examples()),
                "make round ids unique, or remove the repeated rows",
            )
        ]


@dataclass(frozen=True)
class DoubledRows(Check):
    """Rows that equal an earlier one in every column of the schema.

    Rows are compared by 64-bit hashes; beyond 2 million distinct rows a hash sample of them is
    kept, and the count is an estimate.
    """

    rows: DuplicateCount

    @classmethod
    def of(cls, part: LogPart) -> Self:
        keys = row_keys(part.table, part.schema.columns, exact=True)
        return cls(DuplicateCount.of(keys, _DOUBLED_KEYS, _numbers(part)))

    def merge(self, other: Self) -> Self:
        return type(self)(self.rows.merge(other.rows))

    def findings(self, facts: LogFacts) -> list[Finding]:
        twice = self.rows.count()
        if twice == 0:
            return []
        schema = facts.schema
        # Without a time or an id, equal rows are what two users in the same situation make.
        named = [n for n in (schema.timestamp, schema.round_id, schema.user_id) if n is not None]
        about = "about " if self.rows.shift else ""
        return [
            Finding(
                "warning" if named else "info",
                "doubled rows",
                f"{about}{twice:,} rows equal an earlier one in every column"
                + ("" if named else " (there is no time, round or user to tell them apart)"),
                {"rows": twice},
                rows_text(self.rows.examples()),
                "remove what was written twice (a retried job, two exports of one day); each copy "
                "counts as evidence of its own, so intervals are too narrow"
                if named
                else "",
            )
        ]


def _numbers(part: LogPart) -> NDArray[np.int64]:
    return np.arange(part.first_row, part.first_row + part.table.num_rows)
