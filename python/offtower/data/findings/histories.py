"""Histories: what is done with odd ones, and those that contain the row itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from offtower.data.findings.base import Check, Finding, LogFacts, LogPart
from offtower.data.histories import read_events
from offtower.data.schema import FeatureSpec

_LEAST_ROWS = 100
_SHARE = 0.5
"""Of rows whose newest event is the item that they show; above it they are taken for one event."""


@dataclass(frozen=True)
class _Counts:
    """Of one feature: rows, those with an empty, a cut, an unordered history and with their own
    item as the newest event or as the one before; events, and those of unknown items."""

    rows: int = 0
    empty: int = 0
    cut: int = 0
    unordered: int = 0
    own_newest: int = 0
    own_second: int = 0
    events: int = 0
    unknown: int = 0

    @classmethod
    def of(cls, part: LogPart, spec: FeatureSpec) -> _Counts:
        table, schema = part.good, part.schema
        events = read_events(spec, table.column(spec.source), table, schema.timestamp)
        length = np.diff(events.offsets)
        newest = events.newest(spec.most_events)
        item = part.catalogue.index_of(newest.items)
        action = part.catalogue.index_of(table.column(schema.action))
        ends = newest.offsets[1:]

        def own(back: int) -> int:
            some = np.flatnonzero(np.diff(newest.offsets) >= back)
            return int((item[ends[some] - back] == action[some]).sum())

        return cls(
            rows=table.num_rows,
            empty=int((length == 0).sum()),
            cut=int((length > spec.most_events).sum()),
            unordered=int(events.unordered().sum()),
            own_newest=own(1),
            own_second=own(2),
            events=len(events.items),
            unknown=int((part.catalogue.index_of(events.items) < 0).sum()),
        )

    def merge(self, other: _Counts) -> _Counts:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Counts(*(mine + theirs for mine, theirs in pairs))


@dataclass(frozen=True)
class Histories(Check):
    """Counts of each history of the schema."""

    counts: tuple[_Counts, ...]

    @classmethod
    def of(cls, part: LogPart) -> Self:
        return cls(tuple(_Counts.of(part, spec) for spec in part.schema.context if spec.history))

    def merge(self, other: Self) -> Self:
        pairs = zip(self.counts, other.counts, strict=True)
        return type(self)(tuple(mine.merge(theirs) for mine, theirs in pairs))

    def findings(self, facts: LogFacts) -> list[Finding]:
        specs = [spec for spec in facts.schema.context if spec.history]
        found: list[Finding] = []
        for spec, counts in zip(specs, self.counts, strict=True):
            found += _findings(spec, counts)
        return found


def _findings(spec: FeatureSpec, counts: _Counts) -> list[Finding]:
    found: list[Finding] = []
    if text := _treatment(spec, counts):
        # Items that left the catalogue are expected; a history without any other is a mistake.
        nothing = counts.unknown == counts.events > 0
        found.append(
            Finding(
                "warning" if nothing else "info",
                "histories",
                f"feature '{spec.name}': {text}",
                {name: float(value) for name, value in vars(counts).items()},
                remedy="check that these are item ids, written as in the catalogue"
                if nothing
                else "",
            )
        )
    filled = counts.rows - counts.empty
    if filled >= _LEAST_ROWS and counts.own_newest > max(_SHARE * filled, 2 * counts.own_second):
        found.append(
            Finding(
                "warning",
                "history contains the row",
                f"feature '{spec.name}': in {counts.own_newest:,} of {filled:,} rows the newest "
                "event is the item that the row shows, so that the history seems to contain the "
                "row's own event, which no policy knows when it serves",
                {"own": counts.own_newest, "rows": filled},
                remedy="end each history before the row: name the column of the events' times "
                "(times), and the rows' timestamp, and later events are refused",
            )
        )
    return found


def _treatment(spec: FeatureSpec, counts: _Counts) -> str:
    """What is done with rows and events that are not as expected; empty without any."""
    most, parts = spec.most_events, []
    if counts.empty:
        have = "rows have" if counts.empty > 1 else "rows has"
        parts.append(f"{counts.empty:,} of {counts.rows:,} {have} an empty history")
    if counts.cut:
        have = "have" if counts.cut > 1 else "has"
        parts.append(
            f"{counts.cut:,} {have} more than {most} events, of which the newest {most} are read"
        )
    if counts.unordered:
        what = "are not in the order of their times, and are sorted"
        if counts.unordered == 1:
            what = "is not in the order of its times, and is sorted"
        parts.append(f"{counts.unordered:,} {what}")
    if counts.unknown:
        what = "names an item" if counts.unknown == 1 else "name items"
        parts.append(
            f"{counts.unknown:,} of {counts.events:,} events {what} that the catalogue does not "
            "have; all such share one row of the table"
        )
    return "; ".join(parts)
