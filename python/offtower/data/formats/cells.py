"""Conversion of text cells to numbers, times and lists, cell by cell.

Every function returns the values, null where a cell is null or bad, and the (n,) mask of bad cells;
None where there is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offtower.data.formats.options import EPOCH_UNITS, FileFormat
from offtower.data.vectors import Mask

Parsed = tuple[pa.Array, Mask | None]
TimeForm = Literal["integer", "number", "naive", "zoned"]
NAIVE = pa.timestamp("us")
ZONED = pa.timestamp("us", tz="UTC")
TIME_TYPES: dict[TimeForm, pa.DataType] = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "naive": NAIVE,
    "zoned": ZONED,
}

_WORDS = {"true": "1", "false": "0"}
_EXACT = 2.0**53


def decode(column: pa.Array) -> Parsed:
    """Bytes as text; bytes that are not UTF-8 are bad."""
    try:
        return pc.cast(column, pa.string()), None
    except pa.ArrowInvalid:
        return each_cell(column, lambda value: bytes(value).decode(), pa.string())


def parse_text(column: pa.Array, file_format: FileFormat) -> pa.Array:
    """Text as it stands, or without the spaces around it if the format says so."""
    if not file_format.trim:
        return column
    trimmed = pc.utf8_trim_whitespace(column)
    null = pc.is_in(trimmed, value_set=pa.array(file_format.null_words, trimmed.type))
    return pc.if_else(null, pa.scalar(None, trimmed.type), trimmed)


def parse_numbers(column: pa.Array, file_format: FileFormat) -> Parsed:
    """Parse float64; true and false are 1 and 0."""
    if file_format.decimal == "." and file_format.thousands is None:
        try:
            return pc.cast(column, pa.float64()), None
        except pa.ArrowInvalid:
            pass
    plain, good = _plain_numbers(column, file_format)
    return pc.cast(plain, pa.float64()), _bad(column, plain, good)


def parse_integers(column: pa.Array, file_format: FileFormat) -> Parsed:
    """Parse int64; 5.0 is 5, and 5.5 is bad."""
    try:
        return pc.cast(column, pa.int64()), None
    except pa.ArrowInvalid:
        pass
    plain, good = _plain_numbers(column, file_format)
    whole = pc.match_substring_regex(plain, r"^[+-]?\d{1,18}$")
    digits = pc.replace_substring_regex(plain, r"^\+", "")
    values = pc.cast(pc.if_else(whole, digits, pa.scalar(None, pa.string())), pa.int64())
    others, wrong = each_cell(
        pc.if_else(pc.fill_null(whole, True), pa.scalar(None, pa.string()), plain),
        _whole,
        pa.int64(),
    )
    bad = _bad(column, plain, good)
    values = pc.coalesce(values, others)
    return values, wrong if bad is None else bad if wrong is None else bad | wrong


def time_form(text: str, file_format: FileFormat) -> TimeForm | None:
    """Form of the times of a column, by one of them; None where it is none."""
    if file_format.time in EPOCH_UNITS:
        return "zoned"
    if file_format.time is not None:
        return "zoned" if file_format.zone or "%z" in file_format.time else "naive"
    text = text.strip()
    if re.fullmatch(r"[+-]?\d+", text):
        return "integer"
    if re.fullmatch(_pattern(file_format.decimal, file_format.thousands), text):
        return "number"
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return None
    return "zoned" if parsed.tzinfo is not None or file_format.zone else "naive"


def parse_times(column: pa.Array, kind: pa.DataType, file_format: FileFormat) -> Parsed:
    """Parse times to `kind`, one of `TIME_TYPES`; those of another form are bad."""
    if kind == pa.int64():
        return parse_integers(column, file_format)
    if kind == pa.float64():
        return parse_numbers(column, file_format)
    if file_format.time in EPOCH_UNITS:
        return _epochs(column, file_format)
    pattern = file_format.time
    zone = file_format.zone if kind == ZONED else None
    if pattern is not None:
        values, left = _patterns(column, pattern)
    else:
        values, left = _iso(column, NAIVE if zone else kind)
    if zone is not None and values.type == NAIVE:
        values, missing = localized(values, zone)
        left = pc.or_(left, missing)
    if pc.any(left).as_py():
        rest = pc.if_else(left, column, pa.scalar(None, column.type))
        more, bad = each_cell(rest, lambda text: _time(text, pattern, zone, kind == ZONED), kind)
        return pc.coalesce(pc.cast(values, kind), more), bad
    return pc.cast(values, kind), None


def parse_vectors(column: pa.Array, file_format: FileFormat) -> Parsed:
    """Parse JSON lists of numbers, or numbers between separators, to lists of float64."""
    kind = pa.list_(pa.float64())
    separator = file_format.list_separator
    try:
        text = pc.utf8_trim_whitespace(column)
        if file_format.decimal != "." or file_format.thousands is not None:
            raise pa.ArrowInvalid("numbers of another form")
        if separator is None:
            inside = pc.match_substring_regex(text, r"^\[[^\[\]]*[^\[\]\s][^\[\]]*\]$")
            if not pc.all(pc.fill_null(inside, True)).as_py():
                raise pa.ArrowInvalid("empty lists, or no lists")
            text, separator = pc.utf8_slice_codeunits(text, 1, -1), ","
        parts = pc.split_pattern(text, separator)
        cells = pc.utf8_trim_whitespace(parts.flatten())
        values = pc.cast(cells, pa.float64())
        mask = pc.is_null(column) if column.null_count else None
        return pa.ListArray.from_arrays(_offsets(parts), values, mask=mask), None
    except (pa.ArrowInvalid, pa.ArrowIndexError):
        return each_cell(column, lambda text: _vector(text, file_format), kind)


def parse_bags(column: pa.Array, file_format: FileFormat) -> Parsed:
    """Parse JSON lists of text and integers, or text between separators, to lists of text."""
    separator = file_format.list_separator
    if separator is not None:
        parts = pc.split_pattern(column, separator)
        empty = pc.equal(column, "")
        if not pc.any(empty).as_py():
            return parts, None
        none = pa.scalar([], parts.type)
        return pc.if_else(empty, none, parts), None
    return each_cell(column, lambda text: bag_values(json.loads(text)), pa.list_(pa.string()))


def bag_values(values: Any) -> list[str | None]:
    """Categories of a parsed JSON list, as text.

    Raises:
        ValueError: it is no list, or holds something else than text and whole numbers.
    """
    if not isinstance(values, list):
        raise ValueError("no list")
    return [None if value is None else category_text(value) for value in values]


def category_text(value: Any) -> str:
    """A category in JSON as text; 5 and 5.0 are "5".

    Raises:
        ValueError: it is a list, an object, or a number that is not whole.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))
    raise ValueError(f"{value!r} is no category")


def _plain_numbers(column: pa.Array, file_format: FileFormat) -> tuple[pa.Array, pa.Array]:
    """Numbers as Arrow parses them, null where a cell is none; and the mask of numbers."""
    text = pc.utf8_trim_whitespace(column)
    for word, number in _WORDS.items():
        same = pc.equal(pc.ascii_lower(text), word)
        text = pc.if_else(same, number, text)
    good = pc.match_substring_regex(text, _pattern(file_format.decimal, file_format.thousands))
    if file_format.thousands is not None:
        text = pc.replace_substring(text, file_format.thousands, "")
    if file_format.decimal != ".":
        text = pc.replace_substring(text, file_format.decimal, ".")
    return pc.if_else(good, text, pa.scalar(None, text.type)), good


@lru_cache
def _pattern(decimal: str, thousands: str | None) -> str:
    point = re.escape(decimal)
    digits = r"\d+"
    if thousands is not None:
        digits = rf"(?:\d+|\d{{1,3}}(?:{re.escape(thousands)}\d{{3}})+)"
    number = rf"(?:{digits}(?:{point}\d*)?|{point}\d+)(?:[eE][+-]?\d+)?"
    return rf"^[+-]?(?:{number}|(?i:nan|inf|infinity))$"


def _bad(column: pa.Array, values: pa.Array, good: pa.Array) -> Mask | None:
    """Cells with content that gave no value; a cell of spaces is null."""
    empty = pc.equal(pc.utf8_trim_whitespace(column), "")
    bad = pc.and_not(pc.and_(pc.is_valid(column), pc.is_null(values)), pc.fill_null(empty, False))
    mask: Mask = bad.to_numpy(zero_copy_only=False)
    return mask if mask.any() else None


def each_cell(column: pa.Array, parse: Callable[[Any], Any], kind: pa.DataType) -> Parsed:
    """Parse cell by cell in Python; a ValueError marks a bad cell."""
    values: list[Any] = [None] * len(column)
    bad = np.zeros(len(column), dtype=bool)
    for row, cell in enumerate(column.to_pylist()):
        if cell is None:
            continue
        try:
            values[row] = parse(cell)
        except (ValueError, OverflowError, RecursionError):
            bad[row] = True
    return pa.array(values, kind), bad if bad.any() else None


def _whole(text: str) -> int:
    if re.fullmatch(r"[+-]?\d+", text):
        value = int(text)
    else:
        number = float(text)
        if not number.is_integer() or abs(number) >= _EXACT:
            raise ValueError(text)
        value = int(number)
    if not -(2**63) <= value < 2**63:
        raise ValueError(text)
    return value


def _epochs(column: pa.Array, file_format: FileFormat) -> Parsed:
    assert file_format.time is not None
    values, bad = parse_integers(column, file_format)
    if bad is not None:
        values, bad = parse_numbers(column, file_format)
    times, wrong = epoch_times(values, file_format.time)
    return times, wrong if bad is None else bad if wrong is None else bad | wrong


def epoch_times(numbers: pa.Array, unit: str) -> Parsed:
    """Numbers of a unit of `EPOCH_UNITS` since 1970 as times, to the microsecond."""
    micros = EPOCH_UNITS[unit]
    values = numbers.to_numpy(zero_copy_only=False)
    approximate = values.astype(np.float64)
    known = np.isfinite(approximate) & (np.abs(approximate) * micros < 2.0**62)
    if pa.types.is_integer(numbers.type) and numbers.null_count == 0:
        kept = np.where(known, values, 0).astype(np.int64)
        counts = kept * np.int64(micros) if micros >= 1 else kept // np.int64(round(1 / micros))
    else:
        counts = np.rint(np.where(known, approximate, 0.0) * micros).astype(np.int64)
    times = pc.cast(pc.cast(pa.array(counts, pa.int64(), mask=~known), NAIVE), ZONED)
    bad: Mask = pc.is_valid(numbers).to_numpy(zero_copy_only=False) & ~known
    return times, bad if bad.any() else None


def _iso(column: pa.Array, kind: pa.DataType) -> tuple[pa.Array, pa.Array]:
    """Times of ISO 8601, and the mask of cells that are left."""
    try:
        return pc.cast(column, kind), pa.array(np.zeros(len(column), dtype=bool))
    except pa.ArrowInvalid:
        return pa.nulls(len(column), kind), pc.is_valid(column)


def _patterns(column: pa.Array, pattern: str) -> tuple[pa.Array, pa.Array]:
    """The same by a pattern. Arrow reads February 31 as March 3, so what it reads is written again
    and compared; cells that differ, as by zeros that were left out, are left."""
    none = pa.nulls(len(column), NAIVE), pc.is_valid(column)
    if "%z" in pattern or "%f" in pattern:
        return none
    try:
        values = pc.strptime(column, format=pattern, unit="s", error_is_null=True)
        same = pc.equal(pc.strftime(values, format=pattern), column)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return none
    same = pc.fill_null(same, False)
    kept = pc.if_else(same, values, pa.scalar(None, values.type))
    return pc.cast(kept, NAIVE), pc.and_not(pc.is_valid(column), same)


def localized(values: pa.Array, zone: str) -> tuple[pa.Array, pa.Array]:
    """Instants of wall clock times, and the mask of times that the clocks skipped."""
    first = pc.assume_timezone(values, zone, ambiguous="earliest", nonexistent="earliest")
    last = pc.assume_timezone(values, zone, ambiguous="earliest", nonexistent="latest")
    skipped = pc.fill_null(pc.not_equal(first, last), False)
    instants = pc.cast(pc.if_else(skipped, pa.scalar(None, first.type), first), ZONED)
    # Arrow ends where the transitions of the zone's file end, and ignores the rule after them.
    late = pc.fill_null(pc.greater(pc.year(values), _LAST_TRANSITION), False)
    if pc.any(late).as_py():
        there = pc.if_else(late, values, pa.scalar(None, values.type))
        exact, bad = each_cell(there, lambda local: _instant(local, zone), ZONED)
        instants = pc.if_else(late, exact, instants)
        if bad is not None:
            skipped = pc.or_(skipped, pa.array(bad))
    return instants, skipped


_LAST_TRANSITION = 2036


def _instant(local: datetime, zone: str) -> datetime:
    """The instant of a wall clock time.

    Raises:
        ValueError: the clocks skipped it.
    """
    there = ZoneInfo(zone)
    instant = local.replace(tzinfo=there).astimezone(UTC)
    if instant.astimezone(there).replace(tzinfo=None) != local:
        raise ValueError("the clocks skipped this time")
    return instant


def _time(text: str, pattern: str | None, zone: str | None, zoned: bool) -> datetime:
    text = text.strip()
    parsed = datetime.strptime(text, pattern) if pattern else datetime.fromisoformat(text)
    if parsed.tzinfo is None and zone is not None:
        parsed = _instant(parsed, zone)
    if (parsed.tzinfo is not None) != zoned:
        raise ValueError("another form")
    if not zoned:
        return parsed
    # Arithmetic, since astimezone fails at the ends of the calendar.
    offset = parsed.utcoffset() or timedelta()
    return (parsed.replace(tzinfo=None) - offset).replace(tzinfo=UTC)


def _offsets(lists: pa.Array) -> pa.Array:
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def _vector(text: str, file_format: FileFormat) -> list[float | None]:
    separator = file_format.list_separator
    if separator is not None:
        parts: Iterable[Any] = text.split(separator) if text.strip() else []
        values = []
        for part in parts:
            number, bad = parse_numbers(pa.array([part], pa.string()), file_format)
            if bad is not None:
                raise ValueError(part)
            values.append(number[0].as_py())
        return values
    return vector_values(json.loads(text))


def vector_values(values: Any) -> list[float | None]:
    """Numbers of a parsed JSON list.

    Raises:
        ValueError: it is no list of numbers.
    """
    if not isinstance(values, list):
        raise ValueError("no list")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{value!r} is no number")
    return [None if value is None else float(value) for value in values]
