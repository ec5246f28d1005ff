"""Findings, and the checks that make them from mergeable sums over parts of a log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.log import TableOrigin
from offtower.data.rules import Fault, find_faults
from offtower.data.schema import LogSchema

Level = Literal["error", "warning", "info"]
Target = Callable[[pa.Table], NDArray[np.floating]]

EXAMPLES = 3
"""Rows that a finding names."""


@dataclass(frozen=True)
class Finding:
    """A result of the validation.

    Attributes:
        level: an error is impossible in a correct log; a warning is suspicious.
        name: of the kind.
        message: what was found, with counts.
        numbers: the figures of the message.
        examples: rows of the log and their values.
        remedy: what to do; empty where nothing is to be done.
    """

    level: Level
    name: str
    message: str
    numbers: dict[str, float] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class LogPart:
    """Rows of a log with their faults.

    Attributes:
        table: (n,) all rows.
        good: the rows without a fault; `row` are their numbers in the log.
        first_row: number of the table's first row in the log.
        target: maps a table to the probabilities of its actions under a policy; None without one.
    """

    table: pa.Table
    good: pa.Table
    row: NDArray[np.int64]
    faults: list[Fault]
    schema: LogSchema
    catalogue: Catalogue
    origin: TableOrigin
    first_row: int
    target: Target | None

    @classmethod
    def of(
        cls,
        table: pa.Table,
        schema: LogSchema,
        catalogue: Catalogue,
        origin: TableOrigin,
        first_row: int,
        target: Target | None = None,
    ) -> LogPart:
        """Check a table whose first row has the number `first_row` in the log."""
        faults = find_faults(table, schema, catalogue, origin.file)
        row = np.arange(first_row, first_row + table.num_rows)
        good = table
        if faults:
            right = ~np.logical_or.reduce([fault.mask for fault in faults])
            good, row = table.filter(pa.array(right)), row[right]
        return cls(table, good, row, faults, schema, catalogue, origin, first_row, target)


@dataclass(frozen=True)
class LogFacts:
    """What is known of the whole log when its findings are made."""

    schema: LogSchema
    num_items: int
    rows: int


class Check(ABC):
    """Sums over rows that tell one kind of finding; they merge in the order of the rows."""

    @classmethod
    @abstractmethod
    def of(cls, part: LogPart) -> Self:
        """Sum over a part."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Return the sums over this part and a later one."""

    @abstractmethod
    def findings(self, facts: LogFacts) -> list[Finding]:
        """Return what the sums over the whole log say."""


def rows_text(rows: list[int] | NDArray[np.int64]) -> tuple[str, ...]:
    """Return examples that name rows."""
    return tuple(f"row {row}" for row in list(rows)[:EXAMPLES])
