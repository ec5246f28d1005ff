"""Files written with every option of a format, read again and compared with their source."""

from __future__ import annotations

import bz2
import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from offtower.data.formats import csv_files, json_lines
from offtower.data.formats.kinds import ColumnKind
from offtower.data.formats.options import FileFormat
from offtower.data.source import read_source

KINDS: dict[str, ColumnKind] = {
    "id": "text",
    "category": "text",
    "number": "number",
    "whole": "integer",
    "time": "time",
    "vector": "vector",
    "bag": "bag",
}
_EPOCH = datetime(1970, 1, 1)
_UNITS = {"seconds": 6, "milliseconds": 3, "microseconds": 0}
_PATTERNS = ("%d.%m.%Y %H:%M:%S", "%Y%m%d%H%M%S", "%m/%d/%Y %H:%M:%S")


@dataclass(frozen=True)
class Written:
    """A file's bytes, its name and format, and the rows that it stands for."""

    content: bytes
    name: str
    file_format: FileFormat
    rows: list[dict[str, Any]]


def _texts(banned: str, spaces: bool) -> st.SearchStrategy[str]:
    characters = st.characters(codec="utf-8", exclude_characters=banned + "\x00\r")
    common = st.sampled_from(["007", "7", "7.0", "NA", "null", "true", "1e3", "ä,ö", "a;b", '5" x'])
    texts = st.one_of(st.text(characters, max_size=8), common)
    texts = texts.filter(lambda text: not set(text) & set(banned))
    return texts if spaces else texts.filter(lambda text: text == text.strip() != "")


def _times(draw: st.DrawFn, rows: int, form: str, unit: str | None) -> list[datetime]:
    """Times without a zone that the form can express."""
    low, high = datetime(1901, 1, 1), datetime(2099, 12, 31)
    times = draw(st.lists(st.datetimes(low, high), min_size=rows, max_size=rows))
    if form == "pattern" or unit == "seconds":
        times = [time.replace(microsecond=0) for time in times]
    elif unit == "milliseconds":
        times = [time.replace(microsecond=time.microsecond // 1000 * 1000) for time in times]
    return times


def _instant(local: datetime, zone: str | None) -> datetime | None:
    """The instant of a wall clock time, the earlier of two; None where the clocks skipped it."""
    if zone is None:
        return local.replace(tzinfo=UTC)
    there = local.replace(tzinfo=ZoneInfo(zone), fold=0)
    instant = there.astimezone(UTC)
    back = instant.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    return instant if back == local else None


def _time_cells(
    draw: st.DrawFn, rows: int
) -> tuple[dict[str, Any], list[str], list[datetime | int]]:
    """Options, cells and values of the time column."""
    form = draw(st.sampled_from(["iso", "pattern", "epoch", "number"]))
    if form == "number":
        numbers = draw(st.lists(st.integers(-(2**62), 2**62), min_size=rows, max_size=rows))
        return {}, [str(number) for number in numbers], list(numbers)
    unit = draw(st.sampled_from(sorted(_UNITS))) if form == "epoch" else None
    times = _times(draw, rows, form, unit)
    if unit is not None:
        micros = [(time - _EPOCH) // timedelta(microseconds=1) for time in times]
        cells = [str(number // 10 ** _UNITS[unit]) for number in micros]
        return {"time": unit}, cells, [time.replace(tzinfo=UTC) for time in times]
    zone = draw(st.sampled_from([None, "Europe/Berlin", "America/New_York"]))
    options: dict[str, Any] = {} if zone is None else {"zone": zone}
    values: list[Any] = times
    if zone is not None:
        instants = [_instant(time, zone) for time in times]
        assume(all(instant is not None for instant in instants))
        values = instants
    if form == "pattern":
        pattern = draw(st.sampled_from(_PATTERNS))
        return {**options, "time": pattern}, [time.strftime(pattern) for time in times], values
    if zone is None and draw(st.booleans()):
        minutes = draw(st.integers(-14 * 60, 14 * 60))
        sign, (hours, rest) = "-" if minutes < 0 else "+", divmod(abs(minutes), 60)
        offset = f"{sign}{hours:02d}:{rest:02d}"
        shifted = [(time - timedelta(minutes=minutes)).replace(tzinfo=UTC) for time in times]
        return options, [time.isoformat() + offset for time in times], shifted
    return options, [time.isoformat(draw(st.sampled_from([" ", "T"]))) for time in times], values


def _number_cell(value: float, file_format: FileFormat) -> str:
    text = repr(value)
    if file_format.thousands is not None and "e" not in text:
        whole, point, rest = text.partition(".")
        text = f"{int(whole):,}".replace(",", "\0") + point + rest
        text = "-" + text if value < 0 and not text.startswith("-") else text
    text = text.replace(".", file_format.decimal)
    return text.replace("\0", file_format.thousands or "")


def _csv_cell(text: str | None, file_format: FileFormat, delimiter: str, every: bool) -> str:
    if text is None:
        return file_format.null_words[0]
    quote = file_format.quote
    if quote is None:
        return text
    special = {delimiter, quote, "\n", "\r"} & set(text)
    if every or special or text in file_format.null_words:
        return quote + text.replace(quote, quote * 2) + quote
    return text


@st.composite
def written_files(draw: st.DrawFn) -> Written:
    kind = draw(st.sampled_from(["csv", "csv", "tsv", "jsonl"]))
    lines = kind == "jsonl"
    rows = draw(st.integers(1, 12))
    trim = not lines and draw(st.booleans())
    quote = None if lines or trim else draw(st.sampled_from(['"', '"', "'", None]))
    decimal = draw(st.sampled_from([".", ","]))
    delimiter = None if kind != "csv" else draw(st.sampled_from([None, ";", "|", "\t"]))
    between = delimiter or ("\t" if kind == "tsv" else ",")
    separator = draw(st.sampled_from([None, " ", "/"]))
    word = draw(st.sampled_from(["", "NULL", r"\N"]))
    bare = quote is None and not lines
    # Without quotes a decimal comma or a JSON list would be cut at commas.
    assume(not (bare and between == "," and (decimal == "," or separator is None)))
    options: dict[str, Any] = {
        "delimiter": delimiter,
        "quote": quote,
        "decimal": decimal,
        "thousands": draw(st.sampled_from([None, "." if decimal == "," else "'", " "])),
        "encoding": draw(st.sampled_from(["utf-8", "utf-16", "latin-1"])),
        "null_words": (word,),
        "trim": trim,
        "list_separator": None if lines else separator,
    }
    if quote == "'" and options["thousands"] == "'":
        options["thousands"] = None
    assume(not (bare and between in (options["thousands"], decimal, separator)))
    times, time_cells, time_values = _time_cells(draw, rows)
    file_format = FileFormat(**options, **times)
    banned = (between + '"\n' + (separator or "")) if bare else (separator or "")
    texts = _texts(banned, spaces=not bare)
    if bare:
        texts = texts.filter(lambda text: text != word and text not in ("", word))
    if options["encoding"] == "latin-1":
        texts = texts.filter(lambda text: all(ord(character) < 256 for character in text))

    def many(values: st.SearchStrategy[Any]) -> list[Any]:
        found: list[Any] = draw(st.lists(values, min_size=rows, max_size=rows))
        return found

    numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)
    smooth = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
    inner = smooth if separator is not None and not lines else numbers
    columns: dict[str, list[Any]] = {
        "id": many(texts),
        "category": many(st.none() | texts),
        "number": many(st.none() | numbers | smooth),
        "whole": many(st.integers(-(2**63), 2**63 - 1)),
        "time": time_values,
        "vector": many(st.lists(inner, min_size=2, max_size=2)),
        "bag": many(st.lists(texts.filter(bool) if separator else texts, min_size=1, max_size=3)),
    }
    truth = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if lines:
        content = _json_content(truth, time_cells, draw)
    else:
        content = _csv_content(truth, time_cells, file_format, between, draw)
    data = content.encode(options["encoding"])
    ending, compress = draw(st.sampled_from(_COMPRESSIONS))
    return Written(compress(data), f"file.{kind}{ending}", file_format, truth)


def _plain(data: bytes) -> bytes:
    return data


_COMPRESSIONS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("", _plain),
    (".gz", gzip.compress),
    (".bz2", bz2.compress),
    (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
]


def _json_content(truth: list[dict[str, Any]], times: list[str], draw: st.DrawFn) -> str:
    """Objects with keys in any order, of which null ones may be left out after the first."""
    lines = []
    ascii_only = draw(st.booleans())
    for number, (row, time) in enumerate(zip(truth, times, strict=True)):
        found = {**row, "time": time, "further": number}
        if number and draw(st.booleans()):
            found = {name: value for name, value in found.items() if value is not None}
        order = draw(st.permutations(list(found)))
        lines.append(json.dumps({name: found[name] for name in order}, ensure_ascii=ascii_only))
    # Only this newline separates lines, not those of str.splitlines.
    return "\n".join(lines) + draw(st.sampled_from(["\n", ""]))


def _csv_content(
    truth: list[dict[str, Any]],
    times: list[str],
    file_format: FileFormat,
    between: str,
    draw: st.DrawFn,
) -> str:
    every = file_format.quote is not None and draw(st.booleans())
    ends = draw(st.sampled_from(["\n", "\r\n"]))
    separator = file_format.list_separator
    order = draw(st.permutations([*KINDS, "further"]))
    pad = draw(st.sampled_from(["", " "])) if file_format.trim else ""
    lines = [between.join(pad + name for name in order)]
    for row, time in zip(truth, times, strict=True):
        vector, bag = row["vector"], row["bag"]
        cells = {
            "id": row["id"],
            "category": row["category"],
            "number": None if row["number"] is None else _number_cell(row["number"], file_format),
            "whole": str(row["whole"]),
            "time": time,
            "vector": json.dumps(vector)
            if separator is None
            else separator.join(repr(value).replace(".", file_format.decimal) for value in vector),
            "bag": json.dumps(bag) if separator is None else separator.join(bag),
            "further": "x",
        }
        texts = [_csv_cell(cells[name], file_format, between, every) for name in order]
        lines.append(between.join(pad + text + pad for text in texts))
    return ends.join(lines) + draw(st.sampled_from([ends, ""]))


def check(file: Written) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.name
        path.write_bytes(file.content)
        # Blocks of a few bytes, so that rows, quotes and characters lie across them.
        small = mock.patch.multiple(csv_files, _BLOCK_BYTES=64, _PEEK_BYTES=128)
        with small, mock.patch.multiple(json_lines, _BLOCK_BYTES=64):
            found = read_source(path, KINDS, file.file_format).to_pylist()
    assert found == file.rows


_SETTINGS = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}


@given(written_files())
@settings(max_examples=30, derandomize=True, **_SETTINGS)
def test_files_of_any_format_are_read_as_they_were_written(file: Written) -> None:
    check(file)


@pytest.mark.slow
@given(written_files())
@settings(max_examples=300, **_SETTINGS)
def test_many_files_of_any_format_are_read_as_they_were_written(file: Written) -> None:
    check(file)
