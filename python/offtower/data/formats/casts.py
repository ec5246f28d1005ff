"""Columns of numbers, times and lists as other types of their kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offtower.data.columns import is_category, is_list, is_text
from offtower.data.formats.cells import Parsed, decode, each_cell, epoch_times, localized
from offtower.data.formats.options import FileFormat
from offtower.data.formats.types import is_list_view, is_string
from offtower.data.vectors import Mask


def as_string(column: pa.Array) -> Parsed:
    """Text in any layout as string or large_string; bytes that are no UTF-8 are bad cells."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if is_text(kind):
        return column, None
    if pa.types.is_string_view(kind):
        return pc.cast(column, pa.string()), None
    return decode(column if pa.types.is_binary(kind) else pc.cast(column, pa.binary()))


def converted(column: pa.Array, kind: pa.DataType, file_format: FileFormat) -> Parsed:
    """A column of numbers, times or lists as another type of its kind."""
    found = column.type
    if pa.types.is_timestamp(kind):
        return _converted_times(column, kind, file_format)
    if is_text(kind):
        if is_string(found):
            text, bad = as_string(column)
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
    if is_list_view(found):
        # pyarrow's own cast gives lists without offsets.
        column, found = relisted(column, column.flatten(), None)[0], pa.list_(found.value_type)
    if is_list(kind) and is_category(kind.value_type):
        values, bad = converted(column.flatten(), kind.value_type, file_format)
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
