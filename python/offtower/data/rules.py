"""Rules of each column, and masks of the rows that violate them by problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.data.catalogue import Catalogue
from offtower.data.columns import (
    Column,
    as_float_array,
    is_category,
    is_list,
    is_number,
    is_text,
    null_mask,
)
from offtower.data.eligible import eligible_items
from offtower.data.formats.bad_cells import BadCells
from offtower.data.histories import history_faults
from offtower.data.round_tables import round_faults
from offtower.data.schema import FeatureSpec, LogSchema
from offtower.data.vectors import LARGEST, Mask, bad_vectors, vector_kinds
from offtower.errors import DataError


@dataclass(frozen=True)
class Fault:
    """Rows of a table that violate a rule in the same way."""

    column: str
    problem: str
    expected: str
    mask: Mask
    values: Mapping[int, Any] | None = None
    """The cells of the rows as they stand in the file, where the table has null for them."""


@dataclass(frozen=True)
class Rule:
    """What a column must hold; `kinds` classifies the rows that `bad` finds."""

    column: str
    expected: str
    type_ok: Callable[[pa.DataType], bool]
    type_expected: str
    bad: Callable[[Column], Mask]
    kinds: Callable[[Column], dict[str, Mask]]


def find_faults(
    table: pa.Table,
    schema: LogSchema,
    catalogue: Catalogue,
    file: str,
    bad_cells: Sequence[BadCells] = (),
) -> list[Fault]:
    """Find the violated rules with their rows, in one pass per column if there are none.

    Args:
        bad_cells: cells that could not be read, which are null in the table.

    Raises:
        DataError: a column is missing or has a wrong type.
    """
    found = [_unreadable(one, table.num_rows) for one in bad_cells]
    unreadable = {fault.column: fault.mask for fault in found}
    for rule in _rules(schema, catalogue):
        column = _column(table, rule, file)
        mask = rule.bad(column)
        for name in ("", rule.column):
            if name in unreadable:
                mask = mask & ~unreadable[name]
        if not mask.any():
            continue
        left = mask.copy()
        for problem, rows in rule.kinds(column).items():
            hit = left & rows
            if hit.any():
                found.append(Fault(rule.column, problem, rule.expected, hit))
                left &= ~hit
        if left.any():
            found.append(Fault(rule.column, "wrong", rule.expected, left))
    for spec in schema.context:
        if spec.history:
            found += [Fault(*one) for one in history_faults(table, spec, schema.timestamp)]
    eligible = eligible_items(catalogue, schema)
    if eligible is not None:
        # The timestamp has a rule of its own.
        columns = eligible.checks.columns(table, file)
        found += [Fault(*one) for one in columns if one[0] != schema.timestamp]
        found += [Fault(*one) for one in eligible.faulty_actions(table, schema.action)]
    if schema.slates and table.num_rows:
        item = catalogue.index_of(table.column(schema.action))
        # A null key or position is reported as such.
        known = ~(
            null_mask(table.column(schema.round_id)) | null_mask(table.column(schema.position))
        )
        for name, problem, expected, mask in round_faults(table, schema, item):
            if (mask := mask & known).any():
                found.append(Fault(name, problem, expected, mask))
    return found


def _unreadable(cells: BadCells, rows: int) -> Fault:
    mask = np.zeros(rows, dtype=bool)
    mask[cells.rows] = True
    values = dict(zip(cells.rows.tolist(), cells.values.to_pylist(), strict=True))
    return Fault(cells.column, cells.problem, cells.expected, mask, values)


def _rules(schema: LogSchema, catalogue: Catalogue) -> Iterator[Rule]:
    text = catalogue.text_ids
    yield Rule(
        schema.action,
        f"the id of an item in the catalogue ({catalogue.num_items:,} items)",
        lambda kind: is_category(kind) and is_text(kind) == text,
        ("text" if text else "integers") + ", as the item ids of the catalogue are",
        lambda column: catalogue.index_of(column) < 0,
        lambda column: {"null": null_mask(column), "an unknown item": ~null_mask(column)},
    )
    low, high = schema.reward_range
    yield Rule(
        schema.reward,
        f"a number in [{low:g}, {high:g}], the schema's reward_range",
        is_number,
        "numbers",
        lambda column: _outside(column, low, high),
        lambda column: _number_kinds(column, low, high),
    )
    if schema.pscore is not None:
        yield Rule(
            schema.pscore,
            "a probability in (0, 1]",
            is_number,
            "numbers",
            lambda column: _outside(column, 0.0, 1.0) | (as_float_array(column) == 0.0),
            lambda column: {
                **_number_kinds(column, 0.0, 1.0, "negative", "above 1"),
                "zero": as_float_array(column) == 0.0,
            },
        )
    for one in schema.rewards:
        yield Rule(
            one.source,
            "a finite number",
            is_number,
            "numbers",
            lambda column: _outside(column, -LARGEST, LARGEST),
            lambda column: _number_kinds(column, -LARGEST, LARGEST, "infinite", "infinite"),
        )
    if schema.weight is not None:
        top = 1.0 if schema.weight_kind == "sampling_rate" else LARGEST
        expected = "a sampling rate in (0, 1]" if top == 1.0 else "a weight above 0"
        yield Rule(
            schema.weight,
            expected,
            is_number,
            "numbers",
            lambda column: _outside(column, 0.0, top) | (as_float_array(column) == 0.0),
            lambda column: {
                **_number_kinds(column, 0.0, top, "negative"),
                "zero": as_float_array(column) == 0.0,
            },
        )
    for spec in schema.context:
        yield _history_rule(spec, text) if spec.history else _feature_rule(spec)
    if schema.timestamp is not None:
        yield Rule(
            schema.timestamp,
            "a time",
            lambda kind: pa.types.is_timestamp(kind) or is_number(kind),
            "times or numbers",
            _null_or_not_finite,
            lambda column: {"null": null_mask(column), "not finite": ~null_mask(column)},
        )
    if schema.position is not None:
        yield _present(schema.position, "an integer", pa.types.is_integer, "integers")
    for name in (schema.behavior_policy, schema.round_id, schema.user_id):
        if name is not None:
            yield _present(name, "text or an integer", is_category, "text or integers")


def _present(name: str, expected: str, ok: Callable[[pa.DataType], bool], types: str) -> Rule:
    return Rule(name, expected, ok, types, null_mask, lambda column: {"null": null_mask(column)})


def _feature_rule(spec: FeatureSpec) -> Rule:
    if spec.kind == "numeric":
        return Rule(
            spec.source,
            "a finite number",
            is_number,
            "numbers",
            lambda column: _outside(column, -LARGEST, LARGEST),
            lambda column: _number_kinds(column, -LARGEST, LARGEST, "infinite", "infinite"),
        )
    if spec.kind == "vector":
        length = "equally many" if spec.dim is None else f"{spec.dim}"
        return Rule(
            spec.source,
            f"a list of {length} finite numbers",
            lambda kind: is_list(kind) and is_number(kind.value_type),
            "lists of numbers",
            lambda column: bad_vectors(column, spec.dim),
            lambda column: vector_kinds(column, spec.dim),
        )
    # A null category or bag is a value like any other: unknown, or empty.
    if spec.kind in ("category", "text"):
        return Rule(
            spec.source,
            "a category",
            is_category,
            "text or integers",
            _nothing,
            lambda column: {},
        )
    return Rule(
        spec.source,
        "a list of categories",
        lambda kind: is_list(kind) and is_category(kind.value_type),
        "lists of text or integers",
        _nothing,
        lambda column: {},
    )


def _history_rule(spec: FeatureSpec, text: bool) -> Rule:
    """Unknown items are values like any other, as in bags; `history_faults` has the other rules."""
    return Rule(
        spec.source,
        "a list of item ids",
        lambda kind: is_list(kind) and _ids(kind.value_type, text),
        f"lists of {'text' if text else 'integers'}, as the item ids of the catalogue are",
        _nothing,
        lambda column: {},
    )


def _ids(kind: pa.DataType, text: bool) -> bool:
    return pa.types.is_null(kind) or (is_category(kind) and is_text(kind) == text)


def _column(table: pa.Table, rule: Rule, file: str) -> pa.ChunkedArray:
    if rule.column not in table.column_names:
        raise DataError(
            f"{file} has no column '{rule.column}'; it has {', '.join(table.column_names)}"
        )
    column = table.column(rule.column)
    if not rule.type_ok(column.type):
        raise DataError(
            f"{file}: column '{rule.column}' holds {column.type}, expected {rule.type_expected}"
        )
    return column


def _outside(column: Column, low: float, high: float) -> Mask:
    """Null, NaN, infinite, below `low` or above `high`."""
    values = as_float_array(column)
    # A comparison with NaN is false, so NaN (and null, which became NaN) counts as outside.
    bad: Mask = ~((values >= low) & (values <= high))
    return bad


def _number_kinds(
    column: Column, low: float, high: float, below: str = "", above: str = ""
) -> dict[str, Mask]:
    values = as_float_array(column)
    null = null_mask(column)
    return {
        "null": null,
        "NaN": np.isnan(values) & ~null,
        "infinite": np.isinf(values),
        below or f"below {low:g}": values < low,
        above or f"above {high:g}": values > high,
    }


def _null_or_not_finite(column: Column) -> Mask:
    if pa.types.is_floating(column.type):
        return ~np.isfinite(as_float_array(column))
    return null_mask(column)


def _nothing(column: Column) -> Mask:
    return np.zeros(len(column), dtype=bool)
