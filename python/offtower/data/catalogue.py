"""The catalogue: item ids, features, and the index from ids to item numbers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offtower.data.catalogue_rows import SLICE_ROWS, CatalogueRows, ParquetRows, TableRows
from offtower.data.columns import (
    Column,
    as_array,
    as_float_array,
    category_values,
    distinct_values,
    is_category,
    is_list,
    is_number,
    is_text,
)
from offtower.data.location import AnyPath, Location
from offtower.data.lookup import Lookup
from offtower.data.manifest import find_parquet_files, read_manifest, write_manifest
from offtower.data.output import check_new, new_directory, new_file
from offtower.data.parquet import Footer
from offtower.data.schema import CatalogueSchema, FeatureKind, FeatureSpec, LogSchema
from offtower.data.vectors import bad_vectors
from offtower.errors import DataError

_FILE_NAME = "part-00000.parquet"

Derived = TypeVar("Derived")


class Catalogue:
    """N items in a fixed order; item number i is row i.

    Ids and their index stay in memory. Features in files are read on demand, a row group at a time.

    Args:
        rows: one row per item.
        schema: names the column of ids and the features.
        fingerprint: of the content; computed by default.

    Raises:
        DataError: a column is missing or of a wrong type, an id is null or a duplicate, a feature
            is not finite.
    """

    def __init__(
        self,
        rows: pa.Table | CatalogueRows,
        schema: CatalogueSchema,
        fingerprint: str | None = None,
    ) -> None:
        if isinstance(rows, pa.Table):
            _check_names(rows.schema, schema)
            rows = TableRows(rows.select(list(schema.columns)))
        _check_types(rows.schema, schema)
        self.schema = schema
        self._rows = rows
        self.item_ids: pa.Array = _ids(rows.column(schema.item_id))
        if len(self.item_ids) == 0:
            raise DataError("the catalogue has no items")
        self.num_items = len(self.item_ids)
        self._index = _IdIndex(self.item_ids)
        self._derived: dict[Hashable, Any] = {}
        self.fingerprint = _check_values(rows, schema) if fingerprint is None else fingerprint

    @classmethod
    def open(
        cls,
        path: AnyPath,
        schema: CatalogueSchema | None = None,
        *,
        log_schema: LogSchema | None = None,
    ) -> Catalogue:
        """Open a directory of Parquet files, in the order of their names.

        Files of a store are copied once to this machine (`data.copies`).

        Args:
            log_schema: of the log that is read with it; its section `eligible` names columns.

        Raises:
            DataError: as for the class, and where the files cannot be read.
        """
        path = Location.of(path)
        files = find_parquet_files(path, "catalogue")
        manifest = read_manifest(path)
        if schema is None:
            if manifest is None:
                raise DataError(
                    f"'{path}' was not written by offtower, so the config must state "
                    "data.catalogue_schema (item_id and features)"
                )
            schema = CatalogueSchema.from_dict(manifest["schema"])
        if log_schema is not None:
            schema = schema.keeping(log_schema.eligible)
        return cls(ParquetRows(files, schema.columns, path, manifest), schema)

    @classmethod
    def from_table(cls, table: pa.Table, schema: CatalogueSchema) -> Catalogue:
        return cls(table, schema)

    @classmethod
    def from_arrays(cls, item_id: Any, features: Mapping[str, np.ndarray]) -> Catalogue:
        """Make a catalogue from arrays: 1-d numbers or text, 2-d vectors."""
        columns: dict[str, Any] = {"item_id": pa.array(item_id)}
        specs = []
        for name, values in features.items():
            values = np.asarray(values)
            if values.ndim == 2:
                flat = pa.array(values.astype(np.float32).ravel())
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
                specs.append(FeatureSpec(name=name, kind="vector", dim=values.shape[1]))
            else:
                columns[name] = pa.array(values)
                kind: FeatureKind = "numeric" if is_number(columns[name].type) else "category"
                specs.append(FeatureSpec(name=name, kind=kind))
        return cls(pa.table(columns), CatalogueSchema(features=tuple(specs)))

    @property
    def text_ids(self) -> bool:
        """Whether the ids are text; they are integers otherwise."""
        return self._index.text

    def index_only(self) -> Catalogue:
        """Return a copy without ids and features, for other processes: at most 16 bytes an item."""
        found = copy.copy(self)
        found._rows = TableRows(self._rows.schema.empty_table())
        found.item_ids = pa.nulls(0, self.item_ids.type)
        found._derived = dict(self._derived)
        return found

    def derived(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """Return what `make` made of this catalogue under this key; it is made once and kept, also
        in copies for other processes."""
        if key not in self._derived:
            assert len(self.item_ids) == self.num_items, "copies of the index have no columns"
            self._derived[key] = make()
        found: Derived = self._derived[key]
        return found

    def column(self, name: str) -> pa.ChunkedArray:
        """Read a whole column of the schema."""
        return self._rows.column(name)

    def table(self, start: int, stop: int) -> pa.Table:
        """Read the rows of items start..stop-1."""
        return self._rows.slice(start, stop)

    def index_of(self, ids: Column) -> NDArray[np.int64]:
        """Find the (n,) item numbers of ids; -1 for null and unknown ids."""
        return self._index.find(ids)


def write_catalogue(directory: AnyPath, table: pa.Table, schema: CatalogueSchema) -> Catalogue:
    """Check a catalogue and write it as a directory that `Catalogue.open` reads.

    Raises:
        DataError: as for `Catalogue`, or the directory exists.
    """
    directory = Location.of(directory)
    check_new(directory)
    catalogue = Catalogue(table, schema)
    with new_directory(directory) as temporary:
        with new_file(temporary / _FILE_NAME) as file:
            rows = catalogue.table(0, catalogue.num_items)
            pq.write_table(rows, file, row_group_size=SLICE_ROWS, write_page_checksum=True)
            # Parquet may change types, so the fingerprint is that of the file as it is read.
            fingerprint = Catalogue.open(file, schema).fingerprint
            listed = [Footer.of_written(file).to_dict(_FILE_NAME)]
        write_manifest(temporary, schema.to_dict(), catalogue.num_items, fingerprint, listed)
    return Catalogue(table, schema, fingerprint)


class _IdIndex:
    """Finds the item numbers of ids by 64-bit keys (see `Lookup`)."""

    def __init__(self, ids: pa.Array) -> None:
        if ids.null_count:
            row = int(np.flatnonzero(pc.is_null(ids).to_numpy(zero_copy_only=False))[0])
            raise DataError(f"item {row} of the catalogue has a null id")
        self._lookup = Lookup(ids)
        self.text = self._lookup.text
        if self._lookup.duplicate is None:
            return
        first, second = self._lookup.duplicate
        if ids[first] == ids[second]:
            raise DataError(
                f"item id {ids[first].as_py()!r} stands twice in the catalogue, "
                f"as items {first} and {second}"
            )
        raise DataError(
            f"the ids {ids[first].as_py()!r} and {ids[second].as_py()!r} share a "
            "64-bit key, which happens once in billions of catalogues; rename one"
        )

    def find(self, ids: Column) -> NDArray[np.int64]:
        if not is_category(ids.type) or is_text(ids.type) != self.text:
            return np.full(len(ids), -1, dtype=np.int64)
        distinct, index = distinct_values(ids)
        of_distinct = self._lookup.find(self._lookup.keys(distinct))
        return np.append(of_distinct, -1)[index]


def _ids(column: pa.ChunkedArray) -> pa.Array:
    """Return ids with integers as int64, or as uint64 if one exceeds the range of int64."""
    array = as_array(column)
    if pa.types.is_uint64(array.type) and (pc.max(array).as_py() or 0) >= 2**63:
        return array
    return category_values(array)


def _check_names(arrow: pa.Schema, schema: CatalogueSchema) -> None:
    for name in schema.columns:
        if name not in arrow.names:
            raise DataError(
                f"the catalogue has no column '{name}'; it has {', '.join(arrow.names)}"
            )


def _check_types(arrow: pa.Schema, schema: CatalogueSchema) -> None:
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
            "bag": (values is not None and is_category(values), "a list of text or integers"),
        }[spec.kind]
        if not fits:
            raise DataError(f"{_where(spec)} must be {wanted}, but is {kind}")


def _check_values(rows: CatalogueRows, schema: CatalogueSchema) -> str:
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
