"""The eligible items of an export: the catalogue's columns that say which items may be shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from offtower.data.catalogue import Catalogue
from offtower.data.eligible import EligibleItems
from offtower.data.parquet_checksums import UNREADABLE
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.errors import RunError
from offtower.retrieval.catalogue_stream import CHUNK, CatalogueStream

FILE = "eligible.parquet"
_ID = "_item_id"


def write_eligible(
    catalogue: CatalogueStream, schema: LogSchema, directory: Path, *, chunk: int = CHUNK
) -> bool:
    """Write the columns that the section `eligible` reads, one row per item, in O(chunk) memory.

    Returns:
        whether there are any: exclusions and candidates alone need none.

    Raises:
        DataError: the catalogue lacks a column.
    """
    columns = () if schema.eligible is None else schema.eligible.item_columns
    if not columns:
        return False
    writer: pq.ParquetWriter | None = None
    try:
        for part in catalogue.chunks(chunk):
            table = part.table(0, part.num_items).select(list(columns))
            if writer is None:
                writer = pq.ParquetWriter(directory / FILE, table.schema)
            writer.write_table(table.cast(writer.schema))
    finally:
        if writer is not None:
            writer.close()
    return True


def open_eligible(
    directory: Path, manifest: dict[str, Any], item_ids: pa.Array
) -> EligibleItems | None:
    """Open the eligible items of an export; None where every item may be shown.

    `EligibleItems.of_contexts` gives the sets of the contexts of a request, and `on` of what it
    returns the operators' form.

    Args:
        directory: of the version. item_ids: (N,) in the order of the vectors.

    Raises:
        RunError: a file is missing or damaged.
    """
    schema = LogSchema.from_dict(manifest["log_schema"])
    section = schema.eligible
    if section is None:
        return None
    table = pa.table({_ID: item_ids})
    if section.item_columns:
        try:
            columns = pq.read_table(directory / FILE, columns=list(section.item_columns))
        except UNREADABLE as error:
            raise RunError(f"'{directory / FILE}' cannot be read: {error}; export again") from error
        if columns.num_rows != len(item_ids):
            raise RunError(
                f"'{directory / FILE}' has {columns.num_rows:,} rows for {len(item_ids):,} items; "
                "export again"
            )
        for name in section.item_columns:
            table = table.append_column(name, columns.column(name))
    catalogue = Catalogue(
        table, CatalogueSchema(item_id=_ID, eligible=section.item_columns), fingerprint="export"
    )
    return EligibleItems(catalogue, schema)
