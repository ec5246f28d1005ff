"""Checks of every row of a log.

A wrong column type (text instead of numbers) is refused for the whole file. A bad value is reported
with file, row, column, value and what was expected.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_float_array, is_text
from offtower.data.formats.bad_cells import shown
from offtower.data.location import AnyPath
from offtower.data.log import TableOrigin
from offtower.data.moments import Moments, QuarantineEffect
from offtower.data.outcomes import OutcomeCounts, settle
from offtower.data.quarantine import REASON, write_quarantine
from offtower.data.round_tables import ordered, whole_rounds
from offtower.data.rows import with_summed_reward
from offtower.data.rules import Fault, find_faults
from offtower.data.schema import LogSchema
from offtower.errors import DataError

__all__ = [
    "REASON",
    "BadRow",
    "BadRowsError",
    "RowChecker",
    "check_table",
    "count_faults",
    "first_bad_rows",
]

_DETAILS = 10
"""Bad rows that a message lists."""


@dataclass(frozen=True)
class BadRow:
    """One bad value."""

    file: str
    row_group: int | None
    """In its file; None where this is not known."""
    file_row: int | None
    """Number of the row in its file, from 0; None where the rows are in memory."""
    row: int
    """Number of the row in the whole log, from 0."""
    column: str
    value: str
    problem: str
    """What is wrong, in a word or two: "null", "NaN", "above 1", "an unknown item"."""
    expected: str
    line: int | None = None
    """Of a text file, from 1, where the row begins; None where this is not known."""

    def __str__(self) -> str:
        inside = "" if self.file_row is None else f", row {self.file_row} of the file"
        if self.line is not None:
            inside = f", line {self.line}"
        inside += "" if self.row_group is None else f", row group {self.row_group}"
        # Do not repeat values that explain themselves (null, nan).
        plain = self.problem.lower() in (self.value.lower(), "wrong")
        why = "" if plain else f" ({self.problem})"
        what = f"column '{self.column}'" if self.column else "it"
        return (
            f"{self.file}{inside}, row {self.row} of the log: "
            f"{what} is {self.value}{why}, expected {self.expected}"
        )


class BadRowsError(DataError):
    """Bad rows were found; `rows` holds the first ones, `counts` all by (column, problem)."""

    def __init__(
        self, rows: list[BadRow], counts: Counter[tuple[str, str]], remedy: str = ""
    ) -> None:
        self.rows = rows
        self.counts = counts
        self.remedy = remedy
        total = sum(counts.values())
        lines = [f"{total:,} bad value{'s' if total > 1 else ''} in the log:"]
        lines += [f"  {row}" for row in rows[:_DETAILS]]
        if total > min(len(rows), _DETAILS):
            lines.append("  in all, in what was read so far:")
            lines += [
                f"    {count:,} x " + (f"column '{column}' is {problem}" if column else problem)
                for (column, problem), count in sorted(counts.items())
            ]
        if remedy:
            lines.append(remedy)
        lines.append(
            "Correct the log, or set such rows aside with --on-bad-rows quarantine "
            "(data.on_bad_rows=quarantine)"
        )
        super().__init__("\n".join(lines))

    def __reduce__(
        self,
    ) -> tuple[type[BadRowsError], tuple[list[BadRow], Counter[tuple[str, str]], str]]:
        """Pickle by arguments, so that workers can raise it."""
        return BadRowsError, (self.rows, self.counts, self.remedy)


def check_table(
    table: pa.Table,
    schema: LogSchema,
    catalogue: Catalogue,
    origin: TableOrigin,
    first_row: int,
) -> list[BadRow]:
    """Find every bad value of a table, by row.

    Args:
        table: rows with the schema's columns.
        origin: where the table comes from, for the reports.
        first_row: number of the table's first row in the whole log.

    Raises:
        DataError: a column is missing or has a wrong type.
    """
    faults = find_faults(table, schema, catalogue, origin.file)
    return first_bad_rows(table, faults, origin, first_row, limit=None)


def count_faults(faults: Iterable[Fault]) -> Counter[tuple[str, str]]:
    """Count bad values by (column, problem)."""
    counts: Counter[tuple[str, str]] = Counter()
    for fault in faults:
        counts[fault.column, fault.problem] += int(fault.mask.sum())
    return counts


def first_bad_rows(
    table: pa.Table,
    faults: list[Fault],
    origin: TableOrigin,
    first_row: int,
    limit: int | None = _DETAILS,
) -> list[BadRow]:
    """Return the first `limit` bad values (None: all), by row."""
    found = sorted(
        (
            (int(row), number)
            for number, fault in enumerate(faults)
            for row in np.flatnonzero(fault.mask)[:limit]
        )
    )[:limit]
    lines = origin.lines([row for row, _ in found])
    return [
        _detail(table, faults[number], row, origin, first_row, line)
        for (row, number), line in zip(found, lines, strict=True)
    ]


class RowChecker:
    """Checks tables in turn; refuses bad rows or writes them to a quarantine folder.

    Args:
        schema, catalogue: what rows must satisfy. Vectors without a `dim` must have the length of
            the first good row's.
        quarantine: folder for bad rows, with a column `_reason`; None refuses them.
    """

    def __init__(
        self, schema: LogSchema, catalogue: Catalogue, quarantine: AnyPath | None = None
    ) -> None:
        self._schema = schema
        self._catalogue = catalogue
        self._quarantine = quarantine
        self._seen: dict[tuple[TableOrigin, int], int] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._outcomes = OutcomeCounts()
        self._effect = QuarantineEffect()
        self._rewards_of: set[tuple[TableOrigin, int]] = set()
        self._lock = threading.Lock()

    @property
    def quarantined(self) -> QuarantineEffect:
        """What the quarantine did to the rewards so far."""
        return self._effect

    @property
    def outcomes(self) -> OutcomeCounts:
        """What the schema's section `outcomes` did to the rows checked so far."""
        return self._outcomes

    @property
    def schema(self) -> LogSchema:
        """The schema, with the lengths of vectors found so far."""
        return self._schema

    @property
    def bad_rows(self) -> int:
        """Rows in quarantine so far, each counted once however often it was read."""
        return sum(self._seen.values())

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """Bad values in quarantine so far by (column, problem); a row may have several."""
        return Counter(self._counts)

    def check(self, table: pa.Table, origin: TableOrigin, first_row: int) -> pa.Table:
        """Return the good rows of a table, with the schema's `outcomes` those that are mature.

        Rows of a round of slates are in the order of their positions.

        Raises:
            BadRowsError: there is a bad row and no quarantine.
            DataError: see `check_table`.
        """
        mature = None
        if self._schema.outcomes is not None:
            settled = settle(table, self._schema)
            table, mature = settled.table, settled.mature
            self._outcomes += settled.counts
            mature = ~whole_rounds(~mature, table, self._schema)
        table = with_summed_reward(table, self._schema)
        good = self.good_rows(table, origin, first_row, mature)
        return ordered(table if good.all() else table.filter(pa.array(good)), self._schema)

    def good_rows(
        self,
        table: pa.Table,
        origin: TableOrigin,
        first_row: int,
        wanted: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.bool_]:
        """Return the (n,) mask of good rows, after writing bad ones to quarantine.

        A round of slates with a bad row is bad as a whole.

        Args:
            wanted: (n,) rows to check and return; all by default.
        """
        bad_cells = origin.bad_cells_of(table.num_rows)
        faults = find_faults(table, self._schema, self._catalogue, origin.file, bad_cells)
        if wanted is not None:
            faults = [replace(fault, mask=fault.mask & wanted) for fault in faults]
            faults = [fault for fault in faults if fault.mask.any()]
        bad = np.zeros(table.num_rows, dtype=bool)
        for fault in faults:
            bad |= fault.mask
        bad = whole_rounds(bad, table, self._schema)
        good = ~bad if wanted is None else ~bad & wanted
        self._learn_lengths(table, ~good)
        if self._quarantine is not None:
            self._add_rewards(table, good, wanted, (origin.key, first_row))
        if not faults:
            return good
        if self._quarantine is None:
            rows = first_bad_rows(table, faults, origin, first_row)
            raise BadRowsError(
                rows, count_faults(faults), fault_remedy(table, faults, self._schema)
            )
        key = (origin.key, first_row)
        with self._lock:
            if key not in self._seen:
                self._set_aside(table, faults, bad, origin, first_row)
                self._seen[key] = int(bad.sum())
                self._counts.update(count_faults(faults))
        return good

    def _add_rewards(
        self,
        table: pa.Table,
        good: NDArray[np.bool_],
        wanted: NDArray[np.bool_] | None,
        key: tuple[TableOrigin, int],
    ) -> None:
        reward = as_float_array(table.column(self._schema.reward))
        known = np.isfinite(reward) if wanted is None else np.isfinite(reward) & wanted
        with self._lock:
            if key not in self._rewards_of:
                self._rewards_of.add(key)
                self._effect += QuarantineEffect(
                    Moments.of(reward[known]), Moments.of(reward[good])
                )

    def _learn_lengths(self, table: pa.Table, bad: NDArray[np.bool_]) -> None:
        specs = self._schema.context
        if all(spec.kind != "vector" or spec.dim is not None for spec in specs) or bad.all():
            return
        row = int(np.argmin(bad))
        learned = tuple(
            replace(spec, dim=len(table.column(spec.source)[row]) or None)
            if spec.kind == "vector" and spec.dim is None
            else spec
            for spec in specs
        )
        self._schema = replace(self._schema, context=learned)

    def _set_aside(
        self,
        table: pa.Table,
        faults: list[Fault],
        bad: NDArray[np.bool_],
        origin: TableOrigin,
        first_row: int,
    ) -> None:
        assert self._quarantine is not None
        reasons: dict[int, list[str]] = {}
        for found in first_bad_rows(table, faults, origin, first_row, limit=None):
            reasons.setdefault(found.row, []).append(str(found))
        rows = np.flatnonzero(bad)
        for row in rows.tolist():
            reasons.setdefault(first_row + row, ["another row of its round is bad"])
        write_quarantine(
            self._quarantine,
            table.take(pa.array(rows)),
            sorted(reasons),
            ["; ".join(reasons[row]) for row in sorted(reasons)],
            origin.file,
            first_row,
        )


def fault_remedy(table: pa.Table, faults: Sequence[Fault], schema: LogSchema) -> str:
    """Return what to do about bad rewards, propensities and ids; empty where none is bad."""
    problems: dict[str, set[str]] = {}
    for fault in faults:
        problems.setdefault(fault.column, set()).add(fault.problem)
    lines = []
    low, high = schema.reward_range
    of_reward = problems.get(schema.reward, set())
    if "null" in of_reward:
        lines.append(
            "A null reward is a pending outcome, never 0: add the section 'outcomes' to the "
            "schema (maturity, and missing: 0 if no outcome means 0)"
        )
    if of_reward & {f"below {low:g}", f"above {high:g}"}:
        reward = _finite(table, schema.reward)
        found = min(0.0, float(reward.min())), float(reward.max())
        lines.append(
            "If these rewards are right, say so in the schema: reward_range: "
            f"[{found[0]:g}, {found[1]:g}] covers those read so far (state the range that is "
            "possible). To set them aside would change the mean reward"
        )
    if schema.pscore is not None and problems.get(schema.pscore, set()) & {"above 1", "negative"}:
        pscore = _finite(table, schema.pscore)
        if pscore.max(initial=0.0) <= 0.0:
            lines.append("No propensity is positive: they look like logarithms. Write exp of them")
        elif pscore.min(initial=0.0) >= 0.0 and pscore.max() <= 100.0:
            lines.append(
                f"Propensities reach {pscore.max():g}: they look like percent. Divide them by 100"
            )
    lines += filter(None, [_id_remedy(table, faults, schema)])
    return "\n".join(lines)


def _finite(table: pa.Table, name: str) -> NDArray[np.float64]:
    values = as_float_array(table.column(name))
    return values[np.isfinite(values)]


def _id_remedy(table: pa.Table, faults: Sequence[Fault], schema: LogSchema) -> str:
    """Return what to do about ids written as floating-point numbers; empty where none is."""
    for fault in faults:
        if fault.column != schema.action or fault.values is not None:
            continue
        ids = table.column(schema.action).filter(pa.array(fault.mask))
        if not is_text(ids.type):
            continue
        floats = ids.filter(pc.match_substring_regex(ids, r"^[0-9]+\.0$"))
        if len(floats):
            return (
                f"Ids such as {floats[0].as_py()!r} look like integers that became floating-point "
                "numbers, as in pandas beside missing values, and text is compared as it stands. "
                f"Write the column as integers: frame['{schema.action}'].astype('Int64')"
            )
    return ""


def _detail(
    table: pa.Table, fault: Fault, row: int, origin: TableOrigin, first_row: int, line: int | None
) -> BadRow:
    value = table.column(fault.column)[row].as_py() if fault.values is None else fault.values[row]
    return BadRow(
        file=origin.file,
        row_group=origin.row_group,
        file_row=None if origin.file_row is None else origin.file_row + row,
        row=first_row + row,
        column=fault.column,
        value=shown(value),
        problem=fault.problem,
        expected=fault.expected,
        line=line,
    )
