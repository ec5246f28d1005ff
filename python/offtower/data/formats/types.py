"""Types that columns of each kind become."""

from __future__ import annotations

import pyarrow as pa

from offtower.data.columns import is_category, is_list, is_number, is_text
from offtower.data.formats.cells import NAIVE, TIME_TYPES, ZONED, TimeForm
from offtower.data.formats.kinds import LIST_KINDS, ColumnKind

EXPECTED: dict[ColumnKind, str] = {
    "text": "text or integers",
    "number": "numbers",
    "integer": "whole numbers",
    "time": "times or numbers",
    "vector": "lists of numbers",
    "bag": "lists of text or integers",
    "labels": "text, integers or lists of them",
    "times": "lists of times or numbers",
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
        listed = is_list(found) or is_list_view(found)
        return target_type("bag" if listed else "text", found, form, large)
    if kind == "time":
        return _time_type(found, form)
    if is_string(found):
        return _parsed_type(kind, found)
    if pa.types.is_dictionary(found):
        found = found.value_type
    if kind in LIST_KINDS:
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
        "times": pa.list_(pa.string()),
        "any": pa.string(),
    }[kind]


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
    view = is_list_view(found)
    if not is_list(found) and not view:
        return None
    if kind == "times" and pa.types.is_timestamp(found.value_type):
        return pa.list_(found.value_type) if view else found
    if kind == "times" and is_string(found.value_type):
        return pa.list_(pa.string())
    if kind in ("vector", "times"):
        if not is_number(found.value_type):
            return None
        return pa.list_(found.value_type) if view else found
    inner = target_type("text", found.value_type, None, large=True)
    if inner is None:
        return None
    return found if inner == found.value_type and not view else pa.list_(inner)


def is_list_view(kind: pa.DataType) -> bool:
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
