"""Times in several units in one column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa

from offtower.data.findings.base import EXAMPLES, Check, Finding, LogFacts, LogPart
from offtower.data.outcomes import NULL_TIME, comparable_times

_UNITS = (
    ("seconds", 10**8, 10**10),
    ("milliseconds", 10**11, 10**13),
    ("microseconds", 10**14, 10**16),
    ("nanoseconds", 10**17, 9 * 10**18),
)
"""Ranges of epoch numbers from 1973 to 2286; they do not overlap."""


@dataclass(frozen=True)
class TimeUnits(Check):
    """Rows by the unit that their time would have, and an example of each.

    Attributes:
        as_numbers: whether the column holds numbers; otherwise times, whose microseconds are
            classified: seconds read as milliseconds lie in January 1970.
    """

    as_numbers: bool
    count: dict[str, int]
    example: dict[str, str]

    @classmethod
    def of(cls, part: LogPart) -> Self:
        name = part.schema.timestamp
        if name is None:
            return cls(True, {}, {})
        column = part.good.column(name)
        as_numbers = not pa.types.is_timestamp(column.type)
        times = comparable_times(column)
        count: dict[str, int] = {}
        example: dict[str, str] = {}
        for unit, low, high in _UNITS:
            hit = (times != NULL_TIME) & (times >= low) & (times < high)
            if hit.any():
                row = int(np.argmax(hit))
                count[unit] = int(hit.sum())
                example[unit] = f"row {part.row[row]}: {column[row].as_py()}"
        return cls(as_numbers, count, example)

    def merge(self, other: Self) -> Self:
        units = dict.fromkeys([*self.count, *other.count])
        return type(self)(
            self.as_numbers,
            {unit: self.count.get(unit, 0) + other.count.get(unit, 0) for unit in units},
            {**other.example, **self.example},
        )

    def findings(self, facts: LogFacts) -> list[Finding]:
        if len(self.count) < 2:
            return []
        counts = sorted(self.count.items(), key=lambda item: -item[1])
        if self.as_numbers:
            shown = ", ".join(f"{count:,} rows in {unit}" for unit, count in counts)
            text = f"the timestamps have several units: {shown}"
        else:
            odd = sum(self.count.values()) - counts[0][1]
            text = (
                f"{odd:,} timestamps are a thousand times or more away from the others: numbers of "
                "several units were read as one"
            )
        return [
            Finding(
                "error",
                "time units",
                text,
                {unit: float(count) for unit, count in counts},
                tuple(self.example[unit] for unit, _ in counts)[:EXAMPLES],
                "write all times in one unit; a split by time, and the maturity of outcomes, are "
                "wrong otherwise",
            )
        ]
