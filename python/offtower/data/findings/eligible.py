"""Excluded items that the catalogue does not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from offtower.data.eligible import eligible_items
from offtower.data.findings.base import Check, Finding, LogFacts, LogPart


@dataclass(frozen=True)
class ExcludedItems(Check):
    """Ids in the lists of the schema's `eligible.exclude`.

    Attributes:
        unknown: ids that the catalogue does not have. ids: all of them.
    """

    unknown: int
    ids: int

    @classmethod
    def of(cls, part: LogPart) -> Self:
        sets = eligible_items(part.catalogue, part.schema)
        return cls(*((0, 0) if sets is None else sets.checks.unknown_excluded(part.good)))

    def merge(self, other: Self) -> Self:
        return type(self)(self.unknown + other.unknown, self.ids + other.ids)

    def findings(self, facts: LogFacts) -> list[Finding]:
        section = facts.schema.eligible
        if self.unknown == 0 or section is None or section.exclude is None:
            return []
        # Items that left the catalogue are expected; a list that never hits it is a mistake.
        nothing = self.unknown == self.ids
        return [
            Finding(
                "warning" if nothing else "info",
                "excluded items",
                f"{self.unknown:,} of the {self.ids:,} ids in column '{section.exclude.column}' "
                "are not in the catalogue and rule out nothing",
                {"unknown": self.unknown, "ids": self.ids},
                remedy="check that these are item ids, written as in the catalogue"
                if nothing
                else "",
            )
        ]
