"""Types that columns of each kind become, and the conversion of a file's columns to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offtower.data.columns import (
    CategoryType,
    as_categories,
    is_category,
    is_list,
    is_number,
    is_text,
)
from offtower.data.formats.bad_cells import BadCells
from offtower.data.formats.cells import (
    NAIVE,
    TIME_TYPES,
    ZONED,
    Parsed,
    TimeForm,
    decode,
    each_cell,
    epoch_times,
    localized,
    parse_bags,
    parse_integers,
    parse_numbers,
    parse_text,
    parse_times,
    parse_vectors,
)
from offtower.data.formats.kinds import ColumnKind
from offtower.data.formats.options import FileFormat
from offtower.data.vectors import Mask

EXPECTED: dict[ColumnKind, str] = {
    "text": "text or integers",
    "number": "numbers",
    "integer": "whole numbers",
    "time": "times or numbers",
    "vector": "lists of numbers",
    "bag": "lists of text or integers",
    "labels": "text, integers or lists of them",
    "any": "anything",
}
"""What a column of each kind must hold, for messages."""


def is_string(kind: pa.DataType) -> bool:
    """Whether values of a type are text or bytes, in any layout."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        is_text(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def target_type(
    kind: ColumnKind, found: pa.DataType, form: TimeForm | None, large: bool
) -> pa.DataType | None:
    """Type that a column of a file becomes.

    Args:
        found: the column's type in the file.
        form: of times that are text; None where no row says it.
        large: whether unsigned integers may exceed int64.

    Returns:
        None where the file's type cannot be one of the kind.
    """
    if kind == "any" or pa.types.is_null(found):
        return found
    if kind == "labels":
        listed = is_list(found) or _is_view(found)
        return target_type("bag" if listed else "text", found, form, large)
    if kind == "time":
        return _time_type(found, form)
    if is_string(found):
        return _parsed_type(kind, found)
    if pa.types.is_dictionary(found):
        found = found.value_type
    if kind in ("vector", "bag"):
        return _list_type(kind, found)
    if kind == "number":
        return found if is_number(found) else None
    if kind == "integer":
        if pa.types.is_uint64(found) or not pa.types.is_integer(found):
            return pa.int64() if is_number(found) else None
        return found
    return _category_type(found, large)


def unified_type(kind: ColumnKind, first: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Type of a column in a folder, from those of two files; None where they differ in kind."""
    if first == other or pa.types.is_null(other):
        return first
    if pa.types.is_null(first):
        return other
    if kind == "number" and is_number(first) and is_number(other):
        return pa.float64()
    if kind in ("text", "labels", "integer", "time") and _integers(first) and _integers(other):
        return pa.int64()
    if kind in ("text", "labels") and is_text(first) and is_text(other):
        return pa.large_string() if _is_large(first) or _is_large(other) else pa.string()
    if kind == "time" and pa.types.is_timestamp(first) and pa.types.is_timestamp(other):
        return pa.timestamp("us", first.tz) if first.tz == other.tz else None
    if is_list(first) and is_list(other):
        values = first.value_type, other.value_type
        if kind == "vector":
            return pa.list_(values[0] if values[0] == values[1] else pa.float64())
        inner = unified_type("text", *values)
        return None if inner is None else pa.list_(inner)
    return None


def plain_type(kind: ColumnKind) -> pa.DataType:
    """Type of a column that no row gives one."""
    return {
        "text": pa.string(),
        "number": pa.float64(),
        "integer": pa.int64(),
        "time": pa.int64(),
        "vector": pa.list_(pa.float64()),
        "bag": pa.list_(pa.string()),
        "labels": pa.string(),
        "any": pa.string(),
    }[kind]


_PARSERS: dict[ColumnKind, Callable[[pa.Array, FileFormat], Parsed]] = {
    "number": parse_numbers,
    "integer": parse_integers,
    "vector": parse_vectors,
    "bag": parse_bags,
}


@dataclass(frozen=True)
class Conversion:
    """Converts the columns of batches to their kinds.

    Args:
        kinds: by column.
        schema: the types that they become.
        file_format: how cells are written.
        ids: columns that are cast to the type of ids elsewhere, such as those of a catalogue.
    """

    kinds: Mapping[str, ColumnKind]
    schema: pa.Schema
    file_format: FileFormat
    ids: Mapping[str, CategoryType] = field(default_factory=dict)

    def with_ids(self, column: str, wanted: CategoryType) -> Conversion:
        """The conversion that casts a column to the type of ids elsewhere."""
        index = self.schema.get_field_index(column)
        found = self.schema.field(index).type
        listed = is_list(found)
        kind: pa.DataType = pa.string() if wanted == "text" else pa.int64()
        if is_text(found.value_type if listed else found) == (wanted == "text"):
            return self
        kind = pa.list_(kind) if listed else kind
        schema = self.schema.set(index, pa.field(column, kind))
        return replace(self, schema=schema, ids={**self.ids, column: wanted})

    def __call__(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, tuple[BadCells, ...]]:
        """Return the batch with the schema's types, and its bad cells, which are null in it."""
        arrays, bad = [], []
        for target in self.schema:
            column = batch.column(target.name)
            if column.type == target.type and not self._trims(target):
                arrays.append(column)
                continue
            values, mask = self._convert(target.name, column, target.type)
            arrays.append(values)
            if mask is not None and mask.any():
                bad.append(self._bad_cells(target, column, mask))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema), tuple(bad)

    def _trims(self, target: pa.Field) -> bool:
        return self.file_format.trim and is_text(target.type)

    def _convert(self, name: str, column: pa.Array, kind: pa.DataType) -> Parsed:
        if name in self.ids and is_list(kind):
            return self._list_of_ids(name, column, kind)
        if name in self.ids:
            text, broken = _as_string(column) if is_string(column.type) else (column, None)
            if is_string(column.type):
                text = parse_text(text, self.file_format)
            values, bad = as_categories(text, self.ids[name])
            return pc.cast(values, kind), bad if broken is None else bad | broken
        if pa.types.is_null(column.type):
            return pa.nulls(len(column), kind), None
        if is_string(column.type):
            return self._parse(name, column, kind)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return _converted(column, kind, self.file_format)

    def _list_of_ids(self, name: str, column: pa.Array, kind: pa.ListType) -> Parsed:
        """Lists of ids; one with an id that has no equal of the type is bad as a whole."""
        bad: Mask | None = None
        if is_string(column.type):
            column, bad = self._parse(name, column, pa.list_(pa.string()))
        values, wrong = as_categories(column.flatten(), self.ids[name])
        lists, mask = relisted(column, pc.cast(values, kind.value_type), wrong)
        return lists, mask if bad is None else bad if mask is None else mask | bad

    def _parse(self, name: str, column: pa.Array, kind: pa.DataType) -> Parsed:
        text, broken = _as_string(column)
        text = parse_text(text, self.file_format)
        what = self.kinds[name]
        if what == "time":
            values, bad = parse_times(text, kind, self.file_format)
        elif what in _PARSERS:
            values, bad = _PARSERS[what](text, self.file_format)
        else:
            values, bad = text, None
        if values.type != kind:
            values = pc.cast(values, kind)
        return values, broken if bad is None else bad if broken is None else bad | broken

    def _bad_cells(self, target: pa.Field, column: pa.Array, mask: Mask) -> BadCells:
        what = self.kinds[target.name]
        if target.name in self.ids:
            what = "integer" if self.ids[target.name] != "text" else what
        first = column[int(np.argmax(mask))].as_py()
        return BadCells.of(target.name, mask, column, _explain(what, target.type, first))


def _explain(kind: ColumnKind, target: pa.DataType, value: Any) -> tuple[str, str]:
    """What is wrong with a cell, and what was expected."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return "not UTF-8", "text in UTF-8 (other encodings are read with format.encoding)"
    text = value if isinstance(value, str) else ""
    if kind in ("text", "labels", "any"):
        return "no id", "text or a whole number"
    if kind == "vector":
        return "no vector", "a JSON list of numbers (or format.list_separator)"
    if kind == "bag":
        return "no bag", "a JSON list of text and whole numbers (or format.list_separator)"
    if pa.types.is_timestamp(target):
        zone = "with a time zone" if target.tz else "without a time zone"
        return (
            "no such time",
            f"a time {zone} as in 2026-01-31T10:00:00{'+01:00' if target.tz else ''} (other forms "
            "are read with format.time, times without a zone with format.zone)",
        )
    what = "a whole number" if pa.types.is_integer(target) else "a number"
    problem = "not a whole number" if pa.types.is_integer(target) else "not a number"
    if "," in text:
        what += " (commas are read with format.decimal or format.thousands)"
    elif text.strip().count(".") > 1:
        what += " (separators of thousands are read with format.thousands)"
    elif kind == "time":
        what += ", as in the rows before (other forms are read with format.time)"
    return problem, what


def _as_string(column: pa.Array) -> Parsed:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if is_text(kind):
        return column, None
    if pa.types.is_string_view(kind):
        return pc.cast(column, pa.string()), None
    return decode(column if pa.types.is_binary(kind) else pc.cast(column, pa.binary()))


def _converted(column: pa.Array, kind: pa.DataType, file_format: FileFormat) -> Parsed:
    """A column of numbers, times or lists as another type of its kind."""
    found = column.type
    if pa.types.is_timestamp(kind):
        return _converted_times(column, kind, file_format)
    if is_text(kind):
        if is_string(found):
            text, bad = _as_string(column)
            return pc.cast(text, kind), bad
        if pa.types.is_integer(found):
            return pc.cast(column, kind), None
        return each_cell(column, _whole_text, kind)
    if pa.types.is_integer(kind):
        if pa.types.is_floating(found):
            return _whole_numbers(column, kind)
        try:
            return pc.cast(column, kind), None
        except pa.ArrowInvalid:
            return each_cell(column, _whole_number, kind)
    if _is_view(found):
        # pyarrow's own cast gives lists without offsets.
        column, found = relisted(column, column.flatten(), None)[0], pa.list_(found.value_type)
    if is_list(kind) and is_category(kind.value_type):
        values, bad = _converted(column.flatten(), kind.value_type, file_format)
        lists, mask = relisted(column, values, bad)
        return pc.cast(lists, kind), mask
    return pc.cast(column, kind, safe=False), None


def _converted_times(column: pa.Array, kind: pa.DataType, file_format: FileFormat) -> Parsed:
    found = column.type
    if not pa.types.is_temporal(found):
        assert file_format.time is not None
        return epoch_times(column, file_format.time)
    if kind.tz is not None and (pa.types.is_date(found) or found.tz is None):
        local = pc.cast(column, pa.timestamp("us"), safe=False)
        values, skipped = localized(local, file_format.zone or "UTC")
        bad: Mask = skipped.to_numpy(zero_copy_only=False)
        return values, bad if bad.any() else None
    return pc.cast(column, kind, safe=False), None


def relisted(lists: pa.Array, values: pa.Array, bad: Mask | None) -> Parsed:
    """Lists with other values; a list with a bad one is null, and bad as a whole."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    wrong: Mask | None = None
    null = pc.is_null(lists).to_numpy(zero_copy_only=False)
    if bad is not None and bad.any():
        wrong = np.zeros(len(lists), dtype=bool)
        wrong[np.repeat(np.arange(len(lists)), lengths)[bad]] = True
        null = null | wrong
    mask = pa.array(null) if null.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=mask), wrong


def _whole_numbers(column: pa.Array, kind: pa.DataType) -> Parsed:
    """Whole floating-point numbers as integers; NaN, as pandas writes a missing one, is null."""
    values = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    missing = np.isnan(values)
    whole = (np.rint(values) == values) & (np.abs(values) < 2.0**53)
    bad = ~whole & ~missing
    integers = np.where(whole, values, 0.0).astype(np.int64)
    converted = pc.cast(pa.array(integers, pa.int64(), mask=~whole), kind)
    return converted, bad if bad.any() else None


def _whole_number(value: Any) -> int:
    if int(value) != value or not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{value} is no whole number of 64 bits")
    return int(value)


def _whole_text(value: Any) -> str:
    if int(value) != value:
        raise ValueError(f"{value} is not whole")
    return str(int(value))


def _time_type(found: pa.DataType, form: TimeForm | None) -> pa.DataType | None:
    if is_string(found):
        return pa.null() if form is None else TIME_TYPES[form]
    if pa.types.is_timestamp(found):
        return ZONED if found.tz is None and form == "zoned" else found
    if pa.types.is_date(found):
        return ZONED if form == "zoned" else NAIVE
    if not is_number(found) or pa.types.is_boolean(found):
        return None
    if form == "zoned":
        return ZONED
    if pa.types.is_decimal(found):
        return pa.int64() if found.scale <= 0 else pa.float64()
    return pa.int64() if pa.types.is_uint64(found) else found


def _parsed_type(kind: ColumnKind, found: pa.DataType) -> pa.DataType:
    if kind in ("text", "labels") and (is_text(found) or pa.types.is_large_binary(found)):
        return pa.large_string() if pa.types.is_large_binary(found) else found
    return plain_type(kind)


def _list_type(kind: ColumnKind, found: pa.DataType) -> pa.DataType | None:
    view = _is_view(found)
    if not is_list(found) and not view:
        return None
    if kind == "vector":
        if not is_number(found.value_type):
            return None
        return pa.list_(found.value_type) if view else found
    inner = target_type("text", found.value_type, None, large=True)
    if inner is None:
        return None
    return found if inner == found.value_type and not view else pa.list_(inner)


def _is_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _category_type(found: pa.DataType, large: bool) -> pa.DataType | None:
    if pa.types.is_uint64(found):
        return pa.string() if large else pa.int64()
    if pa.types.is_floating(found):
        return pa.int64()
    if pa.types.is_decimal(found):
        small = found.scale == 0 and found.precision <= 18
        return pa.int64() if small else pa.string()
    return found if is_category(found) else None


def _integers(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) and not pa.types.is_uint64(kind))


def _is_large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind))
