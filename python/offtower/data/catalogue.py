"""The catalogue: item ids, features, and the index from ids to item numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offtower.data.catalogue_checks import check_names, check_types, check_values
from offtower.data.catalogue_index import CatalogueIndex, open_index
from offtower.data.catalogue_rows import SLICE_ROWS, CatalogueRows, ParquetRows, TableRows
from offtower.data.columns import Column, is_number
from offtower.data.location import AnyPath, Location
from offtower.data.lookup import Lookup
from offtower.data.manifest import find_parquet_files, read_manifest, write_manifest
from offtower.data.output import check_new, new_directory, new_file
from offtower.data.parquet import Footer
from offtower.data.schema import CatalogueSchema, FeatureKind, FeatureSpec, LogSchema
from offtower.errors import DataError

_FILE_NAME = "part-00000.parquet"

Derived = TypeVar("Derived")


class Catalogue:
    """N items in a fixed order; item number i is row i.

    Ids and their index stay in memory, or are mapped (`data.catalogue_index`). Features in files
    are read on demand, a row group at a time.

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
            check_names(rows.schema, schema)
            rows = TableRows(rows.select(list(schema.columns)))
        check_types(rows.schema, schema)
        self.schema = schema
        self._rows = rows
        self._index = (
            open_index(rows, schema)
            if isinstance(rows, ParquetRows) and fingerprint is None
            else CatalogueIndex.of(rows, schema, fingerprint)
        )
        self.num_items = rows.num_rows
        self.fingerprint = self._index.fingerprint
        self._derived: dict[Hashable, Any] = {}

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
            if "action" in manifest["schema"]:
                raise DataError(f"'{path}' holds a log, and a catalogue belongs here")
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
        return self._index.lookup.text

    @property
    def item_ids(self) -> pa.Array:
        """(N,) ids in the order of the items."""
        return self._index.ids

    @property
    def in_files(self) -> bool:
        """Whether the rows are read from files, which other processes can open too."""
        return isinstance(self._rows, ParquetRows)

    @property
    def lookup(self) -> Lookup:
        """Of the ids."""
        return self._index.lookup

    def index_only(self) -> Catalogue:
        """Return a copy without features, for other processes. A shared index is not sent, but
        opened where the copy arrives."""
        found = copy.copy(self)
        found._rows = TableRows(self._rows.schema.empty_table())
        found._derived = dict(self._derived)
        return found

    def derived(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """Return what `make` made of this catalogue under this key; it is made once and kept, also
        in copies for other processes."""
        if key not in self._derived:
            assert self._rows.num_rows == self.num_items, "copies of the index have no columns"
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
    rows = catalogue.table(0, catalogue.num_items)
    return Catalogue(table, schema, write_catalogue_tables(directory, [rows], schema))


def write_catalogue_tables(
    directory: AnyPath, tables: Iterable[pa.Table], schema: CatalogueSchema
) -> str:
    """Write the rows of several tables as a catalogue, of which one is in memory at a time.

    Returns:
        Its fingerprint.

    Raises:
        DataError: as for `Catalogue`, or the directory exists.
    """
    with new_directory(Location.of(directory)) as temporary:
        with new_file(temporary / _FILE_NAME) as file:
            with ExitStack() as stack:
                writer: pq.ParquetWriter | None = None
                for table in tables:
                    rows = table.select(list(schema.columns))
                    if writer is None:
                        writer = stack.enter_context(
                            pq.ParquetWriter(file, rows.schema, write_page_checksum=True)
                        )
                    writer.write_table(rows, row_group_size=SLICE_ROWS)
            # Parquet may change types, so the fingerprint is that of the file as it is read.
            place = Location.of(file)
            files = find_parquet_files(place, "catalogue")
            written = ParquetRows(files, schema.columns, place, None)
            fingerprint, items = check_values(written, schema), written.num_rows
            listed = [Footer.of_written(file).to_dict(_FILE_NAME)]
        write_manifest(temporary, schema.to_dict(), items, fingerprint, listed)
    return fingerprint
