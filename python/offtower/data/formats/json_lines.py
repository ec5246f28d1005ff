"""Rows of JSON Lines files: blocks of lines read by pyarrow, and line by line where it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from offtower.data.formats.bad_cells import BadCells
from offtower.data.formats.cells import bag_values, category_text, vector_values
from offtower.data.formats.kinds import LIST_KINDS, ColumnKind
from offtower.data.formats.streams import TextFile
from offtower.data.vectors import Mask
from offtower.errors import DataError

_BLOCK_BYTES = 4 * 2**20
_PEEK_LINES = 1000
_BOM = b"\xef\xbb\xbf"

_TYPES: dict[ColumnKind, tuple[pa.DataType, ...]] = {
    "text": (pa.string(), pa.int64()),
    "number": (pa.float64(),),
    "integer": (pa.int64(),),
    "time": (pa.string(), pa.int64(), pa.float64()),
    "vector": (pa.list_(pa.float64()),),
    "bag": (pa.list_(pa.string()), pa.list_(pa.int64())),
    "times": (pa.list_(pa.string()), pa.list_(pa.int64())),
    "labels": (pa.string(), pa.int64()),
    "any": (pa.string(),),
}
"""Types that the values of a kind may have in a block that pyarrow reads."""


def keys(file: TextFile) -> list[str]:
    """Keys of the first object."""
    for lines in _blocks(file, 2**16):
        row = _parsed(lines[0])
        return list(row) if isinstance(row, dict) else []
    return []


def peek(file: TextFile, names: Mapping[str, ColumnKind]) -> dict[str, list[str]]:
    """Values that are not null of the first lines, as text, by column; only columns found there."""
    found: dict[str, list[str]] = {}
    for lines in _blocks(file, 2**16):
        for line in lines[:_PEEK_LINES]:
            row = _parsed(line)
            for name in names if isinstance(row, dict) else ():
                if name in row:
                    values = found.setdefault(name, [])
                    if row[name] is not None:
                        values.append(_text(row[name]))
        break
    return found


def objects_table(objects: list[Any], kinds: Mapping[str, ColumnKind]) -> pa.Table:
    """Parsed JSON objects as a table, with a column for every key that occurs.

    Columns with a kind are text, or lists, for a conversion to it; others as pyarrow types them.

    Raises:
        DataError: a value is none of its column's kind.
        TypeError: something is no object.
    """
    for row, found in enumerate(objects):
        if not isinstance(found, dict):
            raise TypeError(f"row {row} is {_text(found):.80}, expected a JSON object")
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(key for found in objects for key in found):
        cells = [found.get(name) for found in objects]
        if name not in kinds:
            columns[name] = pa.array(cells)
            continue
        columns[name], wrong = _column(kinds[name], cells)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"'{name}' is {_text(cells[row]):.80} in row {row}, expected {_WANTED[kinds[name]]}"
            )
    return pa.table(columns)


def read_batches(
    file: TextFile, kinds: Mapping[str, ColumnKind]
) -> Iterator[tuple[pa.RecordBatch, tuple[BadCells, ...]]]:
    """Rows with each column as pyarrow types it, or as text; a missing key is null."""
    chosen = dict.fromkeys(kinds, 0)
    for lines in _blocks(file, _BLOCK_BYTES):
        batch = _fast(lines, kinds, chosen)
        if batch is not None:
            yield batch, ()
            continue
        yield _slow(lines, kinds, chosen)


def _fast(
    lines: list[bytes], kinds: Mapping[str, ColumnKind], chosen: Mapping[str, int]
) -> pa.RecordBatch | None:
    schema = pa.schema([(name, _TYPES[kind][chosen[name]]) for name, kind in kinds.items()])
    try:
        table = pa_json.read_json(
            pa.BufferReader(b"\n".join(lines)),
            read_options=pa_json.ReadOptions(block_size=2**31 - 1, use_threads=False),
            parse_options=pa_json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    # Two objects on a line would be two rows.
    if table.num_rows != len(lines):
        return None
    return table.select(list(kinds)).combine_chunks().to_batches()[0]


def _slow(
    lines: list[bytes], kinds: Mapping[str, ColumnKind], chosen: dict[str, int]
) -> tuple[pa.RecordBatch, tuple[BadCells, ...]]:
    rows = [_parsed(line) for line in lines]
    no_object = np.array([not isinstance(row, dict) for row in rows])
    arrays, bad = [], []
    for name, kind in kinds.items():
        cells = [row.get(name) if isinstance(row, dict) else None for row in rows]
        chosen[name] = _choice(kind, cells)
        values, wrong = _column(kind, cells)
        arrays.append(values)
        if wrong.any():
            texts = pa.array([None if cell is None else _text(cell) for cell in cells], pa.string())
            bad.append(BadCells.of(name, wrong, texts, ("of another kind", _WANTED[kind])))
    if no_object.any():
        texts = pa.array([line.decode("utf-8", "replace") for line in lines], pa.string())
        bad.append(BadCells.of("", no_object, texts, ("no object", "one JSON object")))
    return pa.RecordBatch.from_arrays(arrays, list(kinds)), tuple(bad)


_WANTED: dict[ColumnKind, str] = {
    "text": "text or a whole number",
    "number": "a number",
    "integer": "a whole number",
    "time": "a time or a number",
    "vector": "a list of numbers",
    "bag": "a list of text and whole numbers",
    "labels": "text or a whole number",
    "times": "a list of times or whole numbers",
    "any": "text",
}


def _choice(kind: ColumnKind, cells: list[Any]) -> int:
    """Which of the kind's types suits most of the cells."""
    for index, wanted in enumerate(_TYPES[kind]):
        for cell in cells:
            probe = cell[0] if isinstance(cell, list) and cell else cell
            if probe is None or isinstance(probe, list):
                continue
            text = pa.types.is_string(getattr(wanted, "value_type", wanted))
            whole = pa.types.is_integer(getattr(wanted, "value_type", wanted))
            if text == isinstance(probe, str) and (not whole or isinstance(probe, int)):
                return index
            break
    return 0


def _column(kind: ColumnKind, cells: list[Any]) -> tuple[pa.Array, Mask]:
    """Cells as text, or as lists; and the mask of those that are neither."""
    values: list[Any] = [None] * len(cells)
    wrong = np.zeros(len(cells), dtype=bool)
    listed = kind in LIST_KINDS and not any(isinstance(cell, str) for cell in cells)
    for row, cell in enumerate(cells):
        if cell is None:
            continue
        try:
            if kind in ("text", "labels"):
                values[row] = category_text(cell)
            elif listed:
                values[row] = vector_values(cell) if kind == "vector" else bag_values(cell)
            elif kind == "any":
                values[row] = _text(cell)
            elif isinstance(cell, dict) or (isinstance(cell, list) and kind not in LIST_KINDS):
                raise ValueError("no scalar")
            else:
                values[row] = _text(cell)
        except ValueError:
            wrong[row] = True
    inner = pa.float64() if kind == "vector" else pa.string()
    return pa.array(values, pa.list_(inner) if listed else pa.string()), wrong


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _blocks(file: TextFile, size: int) -> Iterator[list[bytes]]:
    """Lines that are not empty, about `size` bytes at a time."""
    with file.open() as stream:
        rest, begun = b"", False
        while block := stream.read(size):
            if not begun:
                block, begun = block.removeprefix(_BOM), True
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            kept = [line for line in lines if line.strip()]
            if kept:
                yield kept
        if rest.strip():
            yield [rest]
