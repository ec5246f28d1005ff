"""The check of every row: nothing bad passes, nothing good is refused, nothing is dropped in silence.

A type that can never be right (text where a number must be) is refused for the whole file; a bad
value is reported with file, row, column, value and what was expected.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import (
    Column,
    as_array,
    as_float_array,
    is_category,
    is_list,
    is_number,
)
from offtower.data.schema import FeatureSpec, LogSchema
from offtower.errors import DataError

Location = tuple[str, int]
"""(file, row group)."""

_DETAILS = 10
"""Bad rows that a message spells out."""

REASON = "_reason"
"""Column of a quarantine file that says what was wrong."""


@dataclass(frozen=True)
class BadRow:
    """One bad value."""

    file: str
    row_group: int
    row: int
    """Number of the row in the whole log, from 0."""
    column: str
    value: str
    expected: str

    def __str__(self) -> str:
        return (
            f"{self.file}, row group {self.row_group}, row {self.row}: column '{self.column}' is "
            f"{self.value}, expected {self.expected}"
        )


class BadRowsError(DataError):
    """Bad rows were found; `rows` holds the first ones, `counts` all of them by kind."""

    def __init__(self, rows: list[BadRow], counts: Counter[tuple[str, str]]) -> None:
        self.rows = rows
        self.counts = counts
        total = sum(counts.values())
        lines = [f"{total:,} bad value{'s' if total > 1 else ''} in the log:"]
        lines += [f"  {row}" for row in rows[:_DETAILS]]
        if total > min(len(rows), _DETAILS):
            lines.append("  in all, in what was read so far:")
            lines += [
                f"    {count:,} x column '{column}', expected {expected}"
                for (column, expected), count in sorted(counts.items())
            ]
        lines.append(
            "Correct the log, or set such rows aside with --on-bad-rows quarantine "
            "(data.on_bad_rows=quarantine)"
        )
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class _Fault:
    """Rows of one table that break one rule."""

    column: str
    expected: str
    mask: NDArray[np.bool_]


def check_table(
    table: pa.Table, schema: LogSchema, catalogue: Catalogue, location: Location, first_row: int
) -> list[BadRow]:
    """Every bad value of a table.

    Args:
        table: rows with the schema's columns.
        location: named in the reports.
        first_row: number of the table's first row in the whole log.

    Raises:
        DataError: a column is missing or has a type that can never be right.
    """
    return [
        _detail(table, fault, int(row), location, first_row)
        for fault in _faults(table, schema, catalogue, location)
        for row in np.flatnonzero(fault.mask)
    ]


class RowChecker:
    """Checks tables one after the other; refuses bad rows or sets them aside.

    Args:
        schema, catalogue: what rows must keep.
        quarantine: folder for bad rows, with a column `_reason`; None refuses them.
    """

    def __init__(
        self, schema: LogSchema, catalogue: Catalogue, quarantine: Path | None = None
    ) -> None:
        self._schema = schema
        self._catalogue = catalogue
        self._quarantine = quarantine
        self._seen: dict[Location, int] = {}
        self._lock = threading.Lock()

    @property
    def bad_rows(self) -> int:
        """Rows set aside so far, each counted once however often it was read."""
        return sum(self._seen.values())

    def check(self, table: pa.Table, location: Location, first_row: int) -> pa.Table:
        """The good rows of a table.

        Raises:
            BadRowsError: there is a bad row and no quarantine.
            DataError: see `check_table`.
        """
        return table.filter(pa.array(self.good_rows(table, location, first_row)))

    def good_rows(
        self, table: pa.Table, location: Location, first_row: int
    ) -> NDArray[np.bool_]:
        """(n,) mask of the good rows; the others are in quarantine when this returns."""
        faults = _faults(table, self._schema, self._catalogue, location)
        if not faults:
            return np.ones(table.num_rows, dtype=bool)
        if self._quarantine is None:
            raise _error(table, faults, location, first_row)
        bad = np.logical_or.reduce([fault.mask for fault in faults])
        with self._lock:
            key = (f"{location[0]}:{first_row}", location[1])
            if key not in self._seen:
                self._set_aside(table, faults, bad, location, first_row)
                self._seen[key] = int(bad.sum())
        good: NDArray[np.bool_] = ~bad
        return good

    def _set_aside(
        self,
        table: pa.Table,
        faults: list[_Fault],
        bad: NDArray[np.bool_],
        location: Location,
        first_row: int,
    ) -> None:
        assert self._quarantine is not None
        self._quarantine.mkdir(parents=True, exist_ok=True)
        rows = np.flatnonzero(bad)
        reasons = [
            "; ".join(
                str(_detail(table, fault, int(row), location, first_row))
                for fault in faults
                if fault.mask[row]
            )
            for row in rows
        ]
        aside = table.take(pa.array(rows)).append_column(REASON, pa.array(reasons))
        path = self._quarantine / f"rows-from-{first_row:012d}.parquet"
        temporary = path.with_name(f".{path.name}.partial")
        pq.write_table(aside, temporary)
        temporary.replace(path)


def bad_vectors(column: Column, dim: int | None) -> NDArray[np.bool_]:
    """(n,) rows whose list is null, of another length than `dim`, or not finite."""
    array = as_array(column)
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
    wanted = dim if dim is not None else (lengths[0] if len(lengths) else 0)
    bad: NDArray[np.bool_] = (lengths != wanted) | (lengths < 0)
    parts = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
    finite = np.isfinite(as_float_array(pc.list_flatten(array)))
    if not finite.all():
        bad[parts[~finite]] = True
    return bad


def _faults(
    table: pa.Table, schema: LogSchema, catalogue: Catalogue, location: Location
) -> list[_Fault]:
    """Broken rules, each with a mask of rows; a table without faults costs a pass per column."""
    found: list[_Fault] = []
    for rule in _rules(schema, catalogue):
        column = _column(table, rule, location)
        mask = rule.bad(column)
        if mask.any():
            found.append(_Fault(rule.column, rule.expected, mask))
    return found


@dataclass(frozen=True)
class _Rule:
    column: str
    expected: str
    type_ok: Callable[[pa.DataType], bool]
    type_expected: str
    bad: Callable[[Column], NDArray[np.bool_]]


def _rules(schema: LogSchema, catalogue: Catalogue) -> Iterator[_Rule]:
    yield _Rule(
        schema.action,
        f"the id of an item in the catalogue ({catalogue.num_items:,} items)",
        is_category,
        "text or integers",
        lambda column: catalogue.index_of(column) < 0,
    )
    low, high = schema.reward_range
    yield _Rule(
        schema.reward,
        f"a number in [{low:g}, {high:g}]",
        is_number,
        "numbers",
        lambda column: _outside(column, low, high),
    )
    if schema.pscore is not None:
        yield _Rule(
            schema.pscore,
            "a probability in (0, 1]",
            is_number,
            "numbers",
            lambda column: _outside(column, 0.0, 1.0) | (as_float_array(column) == 0.0),
        )
    for spec in schema.context:
        rule = _feature_rule(spec)
        if rule is not None:
            yield rule
    if schema.timestamp is not None:
        yield _Rule(
            schema.timestamp,
            "a time",
            lambda kind: pa.types.is_timestamp(kind) or is_number(kind),
            "times or numbers",
            _null_or_not_finite,
        )
    if schema.position is not None:
        yield _Rule(schema.position, "a position", is_category, "integers or text", _null)
    for name in (schema.behavior_policy, schema.round_id, schema.user_id):
        if name is not None:
            yield _Rule(name, "a value", is_category, "text or integers", _null)


def _feature_rule(spec: FeatureSpec) -> _Rule | None:
    if spec.kind == "numeric":
        return _Rule(
            spec.source,
            "a finite number",
            is_number,
            "numbers",
            lambda column: ~np.isfinite(as_float_array(column)),
        )
    if spec.kind == "vector":
        length = "" if spec.dim is None else f"{spec.dim} "
        return _Rule(
            spec.source,
            f"a list of {length}finite numbers",
            lambda kind: is_list(kind) and is_number(kind.value_type),
            "lists of numbers",
            lambda column: bad_vectors(column, spec.dim),
        )
    # A null category or bag is a value like any other: unknown, or empty.
    if spec.kind == "category":
        return _Rule(spec.source, "a category", is_category, "text or integers", _nothing)
    return _Rule(
        spec.source,
        "a list of categories",
        lambda kind: is_list(kind) and is_category(kind.value_type),
        "lists of text or integers",
        _nothing,
    )


def _column(table: pa.Table, rule: _Rule, location: Location) -> pa.ChunkedArray:
    if rule.column not in table.column_names:
        raise DataError(
            f"{location[0]} has no column '{rule.column}'; it has {', '.join(table.column_names)}"
        )
    column = table.column(rule.column)
    if not rule.type_ok(column.type):
        raise DataError(
            f"{location[0]}: column '{rule.column}' holds {column.type}, "
            f"expected {rule.type_expected}"
        )
    return column


def _outside(column: Column, low: float, high: float) -> NDArray[np.bool_]:
    """Null, NaN, infinite, below `low` or above `high`."""
    values = as_float_array(column)
    # A comparison with NaN is false, so NaN (and null, which became NaN) counts as outside.
    bad: NDArray[np.bool_] = ~((values >= low) & (values <= high))
    return bad


def _null(column: Column) -> NDArray[np.bool_]:
    nulls: NDArray[np.bool_] = pc.is_null(as_array(column)).to_numpy(zero_copy_only=False)
    return nulls


def _null_or_not_finite(column: Column) -> NDArray[np.bool_]:
    if pa.types.is_floating(column.type):
        return ~np.isfinite(as_float_array(column))
    return _null(column)


def _nothing(column: Column) -> NDArray[np.bool_]:
    return np.zeros(len(column), dtype=bool)


def _detail(
    table: pa.Table, fault: _Fault, row: int, location: Location, first_row: int
) -> BadRow:
    value = table.column(fault.column)[row].as_py()
    text = repr(value)
    return BadRow(
        file=location[0],
        row_group=location[1],
        row=first_row + row,
        column=fault.column,
        value="null" if value is None else (text if len(text) <= 80 else text[:77] + "..."),
        expected=fault.expected,
    )


def _error(
    table: pa.Table, faults: list[_Fault], location: Location, first_row: int
) -> BadRowsError:
    counts: Counter[tuple[str, str]] = Counter()
    for fault in faults:
        counts[fault.column, fault.expected] += int(fault.mask.sum())
    every = (
        _detail(table, fault, int(row), location, first_row)
        for fault in faults
        for row in np.flatnonzero(fault.mask)[:_DETAILS]
    )
    first = sorted(itertools.islice(every, 100 * _DETAILS), key=lambda bad: bad.row)
    return BadRowsError(first[:_DETAILS], counts)
