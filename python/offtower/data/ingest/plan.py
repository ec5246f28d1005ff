"""What is ingested and how it is split, and what an ingest wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offtower.data.formats.options import SourceFormats
from offtower.data.ingest.histories import HistoryOptions
from offtower.data.location import AnyPath, Location
from offtower.data.outcomes import OutcomeCounts
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.data.split import SplitBy
from offtower.data.validate import ValidationReport


@dataclass
class IngestSummary:
    """What an ingest wrote."""

    log: Location
    catalogue: Location
    rows: int
    items: int
    quarantined: int
    splits: dict[str, int] = field(default_factory=dict)
    outcomes: OutcomeCounts | None = None
    """Rows left out or filled by the schema's section `outcomes`; None without one."""
    notes: tuple[str, ...] = ()
    """What the user should know about the result."""
    report: ValidationReport | None = None
    """What looks wrong in the log, and in its split."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "log": str(self.log),
            "catalogue": str(self.catalogue),
            "rows": self.rows,
            "items": self.items,
            "quarantined": self.quarantined,
            "splits": self.splits,
            "outcomes": None if self.outcomes is None else self.outcomes.to_dict(),
            "notes": list(self.notes),
            "report": None if self.report is None else self.report.to_dict(),
        }


@dataclass(frozen=True)
class IngestSource:
    """Where rows and items come from: files, or folders of files.

    Attributes:
        catalogue: the items; without it those that the log shows, known by their ids alone.
        formats: how the files write their values.
        history: which earlier events each row gets as a feature; None adds none.
    """

    log: AnyPath
    schema: LogSchema
    catalogue: AnyPath | None = None
    catalogue_schema: CatalogueSchema | None = None
    formats: SourceFormats = field(default_factory=SourceFormats)
    history: HistoryOptions | None = None


@dataclass(frozen=True)
class Split:
    """How to split the ingested log into train, validation and, given three fractions, test."""

    by: SplitBy
    fractions: tuple[float, ...] = (0.6, 0.2, 0.2)
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return ("train", "validation", "test")[: len(self.fractions)]
