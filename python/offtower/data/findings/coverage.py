"""Items that the log never shows, and features with one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import pyarrow.compute as pc

from offtower.data.findings.base import Check, Finding, LogFacts, LogPart
from offtower.data.findings.sketches import ItemSet


@dataclass(frozen=True)
class Coverage(Check):
    """The items of the good rows."""

    shown: ItemSet

    @classmethod
    def of(cls, part: LogPart) -> Self:
        number = part.catalogue.index_of(part.good.column(part.schema.action))
        return cls(ItemSet.of(number, part.catalogue.num_items))

    def merge(self, other: Self) -> Self:
        return type(self)(self.shown.merge(other.shown))

    def findings(self, facts: LogFacts) -> list[Finding]:
        shown = len(self.shown)
        share = shown / facts.num_items
        return [
            Finding(
                "info" if share > 0.5 else "warning",
                "coverage",
                f"{shown:,} of {facts.num_items:,} items are shown at least once ({share:.1%})"
                + ("" if share > 0.5 else "; nothing is known of the others"),
                {"shown": shown, "items": facts.num_items},
                remedy=""
                if share > 0.5
                else "leave items out of the catalogue that are not offered any more, or give the "
                "items features, from which those never shown can be predicted",
            )
        ]


@dataclass(frozen=True)
class ConstantColumns(Check):
    """Up to three values of each numeric or categorical feature."""

    values: dict[str, frozenset[str]]

    @classmethod
    def of(cls, part: LogPart) -> Self:
        if part.good.num_rows == 0:
            return cls({})
        return cls(
            {
                spec.name: frozenset(
                    str(v) for v in pc.unique(part.table.column(spec.source)).to_pylist()[:3]
                )
                for spec in part.schema.context
                if spec.kind in ("numeric", "category")
            }
        )

    def merge(self, other: Self) -> Self:
        none: frozenset[str] = frozenset()
        names = dict.fromkeys([*self.values, *other.values])
        return type(self)(
            {
                name: frozenset(
                    sorted(self.values.get(name, none) | other.values.get(name, none))[:3]
                )
                for name in names
            }
        )

    def findings(self, facts: LogFacts) -> list[Finding]:
        return [
            Finding(
                "warning",
                "constant",
                f"feature '{name}' has one value in every row",
                examples=tuple(seen),
                remedy=f"leave '{name}' out of the schema: nothing can be learned from it",
            )
            for name, seen in self.values.items()
            if len(seen) == 1 and facts.rows > 1
        ]
