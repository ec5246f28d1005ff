"""Ids of a catalogue and the index from ids to item numbers, shared by the processes of a machine.

The index of a large catalogue in files is an entry of the machine's cache (`data.node_cache`),
which one process builds and all map. Its key is that of the files' content: their sha256 where a
manifest has it, else their address, size, time of change and footer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.atomic import write_text
from offtower.data.catalogue_checks import check_values
from offtower.data.catalogue_rows import CatalogueRows, ParquetRows
from offtower.data.columns import (
    Column,
    as_array,
    category_values,
    distinct_values,
    is_category,
    is_text,
)
from offtower.data.lookup import Lookup
from offtower.data.mapped_lookup import BYTES_OF_VALUE, open_lookup, write_lookup
from offtower.data.node_cache import SHARE_ABOVE, built_entry, verified_entry
from offtower.data.schema import CatalogueSchema
from offtower.errors import DataError

_FORMAT = "index 1"
_FACTS = "catalogue.json"


@dataclass(frozen=True, eq=False)
class CatalogueIndex:
    """Finds the item numbers of ids."""

    lookup: Lookup
    fingerprint: str

    @classmethod
    def of(
        cls, rows: CatalogueRows, schema: CatalogueSchema, fingerprint: str | None
    ) -> CatalogueIndex:
        """Index the rows in this process's memory.

        Args:
            fingerprint: of the content; by default the values are checked, and it is computed.

        Raises:
            DataError: an id is null or a duplicate, or a feature is not finite.
        """
        ids = _ids(rows.column(schema.item_id))
        _check_ids(ids)
        lookup = Lookup(ids)
        _check_distinct(lookup)
        return cls(lookup, check_values(rows, schema) if fingerprint is None else fingerprint)

    @property
    def ids(self) -> pa.Array:
        """(N,) ids in the order of the items."""
        return self.lookup.values

    def find(self, ids: Column) -> NDArray[np.int64]:
        """Return the (n,) item numbers of ids; -1 for null and unknown ids."""
        if not is_category(ids.type) or is_text(ids.type) != self.lookup.text:
            return np.full(len(ids), -1, dtype=np.int64)
        distinct, index = distinct_values(ids)
        return np.append(self.lookup.find(distinct), -1)[index]


@dataclass(frozen=True, eq=False)
class SharedIndex(CatalogueIndex):
    """An index in mapped files; where it is sent to, it is opened anew, or built from the rows."""

    rows: ParquetRows
    schema: CatalogueSchema

    def __reduce__(self) -> tuple[Callable[..., CatalogueIndex], tuple[Any, ...]]:
        return open_index, (self.rows, self.schema)


def open_index(rows: ParquetRows, schema: CatalogueSchema) -> CatalogueIndex:
    """Return the index of a catalogue in files, shared where it has more than `SHARE_ABOVE` bytes.

    Raises:
        DataError: as `CatalogueIndex.of`.
    """
    size = rows.num_rows * BYTES_OF_VALUE
    if size > SHARE_ABOVE:
        key = hashlib.sha256(repr((_FORMAT, schema, rows.identity)).encode()).hexdigest()[:32]

        def build(folder: Path) -> None:
            index = CatalogueIndex.of(rows, schema, None)
            write_lookup(folder, index.lookup)
            write_text(folder / _FACTS, json.dumps({"fingerprint": index.fingerprint}) + "\n")

        if verified_entry(key) is None:
            rows.fetch()  # Copies take the lock of writers too, so not in `build`.
        entry = built_entry(key, size, build, f"the ids of {rows.num_rows:,} items")
        if entry is not None:
            facts = json.loads((entry.path / _FACTS).read_text(encoding="utf-8"))
            return SharedIndex(open_lookup(entry), facts["fingerprint"], rows, schema)
    return CatalogueIndex.of(rows, schema, None)


def _check_ids(ids: pa.Array) -> None:
    if len(ids) == 0:
        raise DataError("the catalogue has no items")
    if ids.null_count:
        row = int(np.flatnonzero(pc.is_null(ids).to_numpy(zero_copy_only=False))[0])
        raise DataError(f"item {row} of the catalogue has a null id")


def _check_distinct(lookup: Lookup) -> None:
    if lookup.duplicate is not None:
        first, second = lookup.duplicate
        raise DataError(
            f"item id {lookup.values[first].as_py()!r} stands twice in the catalogue, "
            f"as items {first} and {second}"
        )


def _ids(column: pa.ChunkedArray) -> pa.Array:
    """Return ids with integers as int64, or as uint64 if one exceeds the range of int64."""
    array = as_array(column)
    if pa.types.is_uint64(array.type) and (pc.max(array).as_py() or 0) >= 2**63:
        return array
    return category_values(array)
