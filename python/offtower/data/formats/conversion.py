"""Conversion of a file's columns to their kinds, and what is wrong with a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offtower.data.columns import CategoryType, as_categories, is_list, is_text
from offtower.data.formats.bad_cells import BadCells
from offtower.data.formats.casts import as_string, converted, relisted
from offtower.data.formats.cells import (
    Parsed,
    parse_bags,
    parse_integers,
    parse_numbers,
    parse_text,
    parse_times,
    parse_vectors,
)
from offtower.data.formats.kinds import ColumnKind
from offtower.data.formats.options import FileFormat
from offtower.data.formats.types import is_string
from offtower.data.vectors import Mask

_PARSERS: dict[ColumnKind, Callable[[pa.Array, FileFormat], Parsed]] = {
    "number": parse_numbers,
    "integer": parse_integers,
    "vector": parse_vectors,
    "bag": parse_bags,
    "times": parse_bags,
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
            text, broken = as_string(column) if is_string(column.type) else (column, None)
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
        return converted(column, kind, self.file_format)

    def _list_of_ids(self, name: str, column: pa.Array, kind: pa.ListType) -> Parsed:
        """Lists of ids; one with an id that has no equal of the type is bad as a whole."""
        bad: Mask | None = None
        if is_string(column.type):
            column, bad = self._parse(name, column, pa.list_(pa.string()))
        values, wrong = as_categories(column.flatten(), self.ids[name])
        lists, mask = relisted(column, pc.cast(values, kind.value_type), wrong)
        return lists, mask if bad is None else bad if mask is None else mask | bad

    def _parse(self, name: str, column: pa.Array, kind: pa.DataType) -> Parsed:
        text, broken = as_string(column)
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
    if kind == "times":
        return "no list of times", "a JSON list of whole numbers or of times (ISO 8601)"
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
