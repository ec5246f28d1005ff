"""Numbers and texts that stand for a missing value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offtower.data.columns import as_float_array, category_values, is_text
from offtower.data.findings.base import EXAMPLES, Check, Finding, LogFacts, LogPart, rows_text
from offtower.data.outcomes import NULL_TIME, comparable_times

_NUMBERS = (-1.0, -9.0, -99.0, -999.0, -9999.0, -99999.0, 999.0, 9999.0, 99999.0, 999999.0)
_TEXTS = ("", "-1", "-999", "null", "none", "nan", "n/a", "undefined", "unknown", "\\n")
_SHARE = 5e-4
"""Share of the rows from which a value is no accident."""
_EPOCH_DAY = 86_400 * 1_000_000
_REMEDY = "write such values as null (an empty cell, or a null word of the schema's format)"


@dataclass(frozen=True)
class NumericSentinels(Check):
    """Numeric features with -1, -999 and the like beyond all other values.

    Attributes:
        count: rows by (feature, value).
        rows: the first of them.
        low, high: smallest and largest other value of each feature.
    """

    count: dict[tuple[str, float], int]
    rows: dict[tuple[str, float], tuple[int, ...]]
    low: dict[str, float]
    high: dict[str, float]

    @classmethod
    def of(cls, part: LogPart) -> Self:
        found = cls({}, {}, {}, {})
        for spec in part.schema.context:
            if spec.kind != "numeric":
                continue
            values = as_float_array(part.good.column(spec.source))
            other = np.ones(len(values), dtype=bool)
            for number in _NUMBERS:
                hit = values == number
                if hit.any():
                    key = spec.name, number
                    found.count[key] = int(hit.sum())
                    found.rows[key] = tuple(part.row[hit][:EXAMPLES].tolist())
                    other &= ~hit
            rest = values[other]
            found.low[spec.name] = float(rest.min(initial=math.inf))
            found.high[spec.name] = float(rest.max(initial=-math.inf))
        return found

    def merge(self, other: Self) -> Self:
        keys = dict.fromkeys([*self.count, *other.count])
        names = dict.fromkeys([*self.low, *other.low])
        return type(self)(
            {key: self.count.get(key, 0) + other.count.get(key, 0) for key in keys},
            {key: (self.rows.get(key, ()) + other.rows.get(key, ()))[:EXAMPLES] for key in keys},
            {n: min(self.low.get(n, math.inf), other.low.get(n, math.inf)) for n in names},
            {n: max(self.high.get(n, -math.inf), other.high.get(n, -math.inf)) for n in names},
        )

    def findings(self, facts: LogFacts) -> list[Finding]:
        found = []
        for (name, number), count in sorted(self.count.items()):
            low, high = self.low[name], self.high[name]
            if count < max(2, _SHARE * facts.rows) or not low <= high:
                continue
            if not _beyond(number, low, high):
                continue
            found.append(
                Finding(
                    "warning",
                    "sentinel",
                    f"feature '{name}' is {number:g} in {count:,} rows, beyond all other values "
                    f"({low:g} to {high:g}): it may stand for a missing value",
                    {"rows": count, "value": number},
                    rows_text(list(self.rows[name, number])),
                    _REMEDY + "; as numbers they distort the scale of the feature",
                )
            )
        return found


def _beyond(number: float, low: float, high: float) -> bool:
    """Whether a number lies apart from others in [low, high].

    -1 beside 0..90 does; beside -3..3 it is a value, and beside 0 and 1 a code.
    """
    if number > 0.0:
        return number > 2.0 * max(high, 0.0)
    if low >= 0.0:
        return number <= -99.0 or high > -number
    return number < 2.0 * low


@dataclass(frozen=True)
class TextSentinels(Check):
    """Ids and categories such as "null", "-1" or empty text, by column."""

    count: dict[tuple[str, str], int]

    @classmethod
    def of(cls, part: LogPart) -> Self:
        schema = part.schema
        names = [schema.user_id, schema.round_id, schema.behavior_policy]
        names += [spec.source for spec in schema.context if spec.kind == "category"]
        found: dict[tuple[str, str], int] = {}
        for name in dict.fromkeys(n for n in names if n is not None):
            column = part.good.column(name)
            counts = pc.value_counts(category_values(column))
            values = counts.field("values")
            texts = pc.utf8_lower(pc.cast(values, pa.string()))
            hit = pc.fill_null(pc.is_in(texts, pa.array(_TEXTS)), False)
            if not is_text(column.type):
                hit = pc.fill_null(pc.is_in(texts, pa.array(["-1", "-999"])), False)
            for value, count in zip(
                values.filter(hit).to_pylist(),
                counts.field("counts").filter(hit).to_pylist(),
                strict=True,
            ):
                found[name, str(value)] = count
        return cls(found)

    def merge(self, other: Self) -> Self:
        keys = dict.fromkeys([*self.count, *other.count])
        return type(self)({key: self.count.get(key, 0) + other.count.get(key, 0) for key in keys})

    def findings(self, facts: LogFacts) -> list[Finding]:
        user = facts.schema.user_id
        return [
            Finding(
                "warning",
                "sentinel",
                f"column '{name}' is {value!r} in {count:,} rows: it may stand for a missing value"
                + (
                    ", and all these rows count as one user, whose rows are taken as correlated"
                    if name == user
                    else ""
                ),
                {"rows": count},
                (repr(value),),
                "give users without an id an id of their own (a session or a cookie)"
                if name == user
                else _REMEDY,
            )
            for (name, value), count in sorted(self.count.items())
            if count >= max(2, _SHARE * facts.rows)
        ]


@dataclass(frozen=True)
class EpochTimes(Check):
    """Timestamps on 1970-01-01 (UTC), among others."""

    count: int
    rows: tuple[int, ...]

    @classmethod
    def of(cls, part: LogPart) -> Self:
        name = part.schema.timestamp
        if name is None:
            return cls(0, ())
        column = part.good.column(name)
        times = comparable_times(column)
        day = _EPOCH_DAY if pa.types.is_timestamp(column.type) else 1
        hit = (times > NULL_TIME) & (np.abs(times) < day)
        return cls(int(hit.sum()), tuple(part.row[hit][:EXAMPLES].tolist()))

    def merge(self, other: Self) -> Self:
        return type(self)(self.count + other.count, (self.rows + other.rows)[:EXAMPLES])

    def findings(self, facts: LogFacts) -> list[Finding]:
        # A single row 0 may begin a log that counts from 0.
        if not max(1, _SHARE * facts.rows) < self.count < facts.rows:
            return []
        return [
            Finding(
                "warning",
                "sentinel",
                f"{self.count:,} timestamps are 0 or on 1970-01-01: they may stand for a missing "
                "time, and come first in a split by time",
                {"rows": self.count},
                rows_text(list(self.rows)),
                "set the true time, or leave these rows out",
            )
        ]
