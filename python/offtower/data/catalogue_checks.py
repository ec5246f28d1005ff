"""Checks of a catalogue's columns and values."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.data.catalogue_rows import CatalogueRows
from offtower.data.columns import as_float_array, is_category, is_list, is_number
from offtower.data.schema import CatalogueSchema, FeatureSpec
from offtower.data.vectors import bad_vectors
from offtower.errors import DataError


def check_names(arrow: pa.Schema, schema: CatalogueSchema) -> None:
    for name in schema.columns:
        if name not in arrow.names:
            raise DataError(
                f"the catalogue has no column '{name}'; it has {', '.join(arrow.names)}"
            )


def check_types(arrow: pa.Schema, schema: CatalogueSchema) -> None:
    kind = arrow.field(schema.item_id).type
    if not is_category(kind):
        raise DataError(
            f"item ids must be text or integers, but column '{schema.item_id}' is {kind}"
        )
    for spec in schema.features:
        kind = arrow.field(spec.source).type
        values = kind.value_type if is_list(kind) else None
        fits, wanted = {
            "numeric": (is_number(kind), "a number"),
            "vector": (values is not None and is_number(values), "a list of numbers"),
            "category": (is_category(kind), "text or an integer"),
            "text": (is_category(kind), "text"),
            "bag": (values is not None and is_category(values), "a list of text or integers"),
        }[spec.kind]
        if not fits:
            raise DataError(f"{_where(spec)} must be {wanted}, but is {kind}")


def check_values(rows: CatalogueRows, schema: CatalogueSchema) -> str:
    """Check in one pass that numbers are finite and vectors of one length.

    Returns:
        sha256 of the schema and of every value, independent of the chunks.
    """
    digest = hashlib.sha256(repr(schema).encode())
    bad = {s.name: _BadItems(s) for s in schema.features if s.kind in ("numeric", "vector")}
    first = 0
    for table in rows.slices():
        for spec in schema.features:
            if spec.name in bad:
                bad[spec.name].check(table.column(spec.source), first)
        first += table.num_rows
        part = table.combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, part.schema.remove_metadata()) as writer:
            writer.write_table(part.replace_schema_metadata(None))
        digest.update(sink.getvalue())
    for found in bad.values():
        found.raise_if_any()
    return digest.hexdigest()


class _BadItems:
    """The first item whose numeric or vector feature is unusable, and the count of such items."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._spec = spec
        self._dim = spec.dim
        self._first: tuple[int, Any] | None = None
        self._count = 0

    def check(self, column: pa.ChunkedArray, first_item: int) -> None:
        if self._spec.kind == "numeric":
            bad = np.flatnonzero(~np.isfinite(as_float_array(column)))
        else:
            bad = np.flatnonzero(bad_vectors(column, self._dim))
            if self._dim is None:
                good = np.setdiff1d(np.arange(min(len(column), bad.size + 1)), bad)
                self._dim = len(column[int(good[0])]) if good.size else None
        if bad.size and self._first is None:
            self._first = (first_item + int(bad[0]), column[int(bad[0])].as_py())
        self._count += bad.size

    def raise_if_any(self) -> None:
        if self._first is None:
            return
        item, value = self._first
        dim = self._spec.dim
        raise DataError(
            f"{_where(self._spec)}: item {item} has {value!r}, expected finite numbers"
            + (f" (a list of {dim})" if self._spec.kind == "vector" and dim else "")
            + (f"; {self._count} items in all have such values" if self._count > 1 else "")
        )


def _where(spec: FeatureSpec) -> str:
    return f"catalogue feature '{spec.name}' (column '{spec.source}')"
