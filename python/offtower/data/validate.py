"""Validation of a log in one streaming pass: every row, and what looks wrong in the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from offtower.data.catalogue import Catalogue
from offtower.data.eligible import reading_index
from offtower.data.findings import CHECKS, Check, Finding, LogFacts, LogPart, Target
from offtower.data.log import Log
from offtower.execution import LOCAL, Execution
from offtower.mapping import merge_all, pieces
from offtower.progress import report_rows

_PART_ROWS = 1_000_000
"""Approximate rows of a part of the log."""


@dataclass(frozen=True)
class ValidationReport:
    """All findings; `ok` if none is an error."""

    rows: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)

    @property
    def remarks(self) -> tuple[Finding, ...]:
        """Errors and warnings, the errors first."""
        remarks = [finding for finding in self.findings if finding.level != "info"]
        return tuple(sorted(remarks, key=lambda finding: finding.level != "error"))

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "rows": self.rows,
            "findings": [
                {
                    "level": finding.level,
                    "name": finding.name,
                    "message": finding.message,
                    "numbers": {
                        name: value if math.isfinite(value) else None
                        for name, value in finding.numbers.items()
                    },
                    "examples": list(finding.examples),
                    "remedy": finding.remedy,
                }
                for finding in self.findings
            ],
        }


@dataclass(frozen=True)
class _Sums:
    """The sums of all checks over some rows."""

    rows: int
    checks: tuple[Check, ...]

    @classmethod
    def of(cls, part: LogPart) -> _Sums:
        return cls(part.table.num_rows, tuple(check.of(part) for check in CHECKS))

    def merge(self, other: _Sums) -> _Sums:
        """Merge with the sums of later rows."""
        merged = (a.merge(b) for a, b in zip(self.checks, other.checks, strict=True))
        return _Sums(self.rows + other.rows, tuple(merged))


def validate_log(
    log: Log,
    catalogue: Catalogue,
    target: Target | None = None,
    *,
    execution: Execution = LOCAL,
) -> ValidationReport:
    """Check every row and the averages of a log, in bounded memory.

    The mean of 1/pscore estimates the number of items that the logging policy can show (exactly N
    where every item has positive probability): E[1/pi_0(a|x)] = #{a: pi_0(a|x) > 0}. A mean far
    above N says that propensities are too small; far below, that they are too large or that many
    items are never shown. `data.findings` has the other checks.

    Args:
        target: maps a table of n rows to (n,) probabilities pi(a_i|x_i) of the logged actions under
            a policy. The mean of pi/pscore is the share of the policy's mass with support.
        execution: reads the parts of the log; the results have the same bits with any.

    Raises:
        DataError: a column is missing or has a wrong type; a file cannot be read.
    """
    mapper, progress = execution.mapper, execution.progress
    sizes = log.row_group_sizes
    groups = max(1, round(_PART_ROWS / max(1.0, float(sizes.mean()))))
    parts = pieces(len(sizes), groups, mapper.workers)
    progress.start("validating", log.num_rows)
    index = reading_index(catalogue, log.schema)
    found = mapper.map(partial(_sums_of, log, index, target), parts, "validating")
    sums = merge_all(report_rows(found, progress), empty="the log has no rows")
    progress.finish()
    facts = LogFacts(log.schema, catalogue.num_items, log.num_rows)
    return ValidationReport(
        log.num_rows, tuple(one for check in sums.checks for one in check.findings(facts))
    )


def _sums_of(log: Log, catalogue: Catalogue, target: Target | None, groups: range) -> _Sums:
    first_rows = log.first_rows

    def parts() -> Iterator[_Sums]:
        for group, table in zip(groups, log.read_row_groups(groups), strict=True):
            first = int(first_rows[group])
            yield _Sums.of(
                LogPart.of(table, log.schema, catalogue, log.location(group), first, target)
            )

    return merge_all(parts())
