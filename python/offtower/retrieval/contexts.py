"""Contexts of a search, from files or JSON, with the types that the policy was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from offtower.data.columns import as_array, as_categories, is_list, is_text
from offtower.data.formats.bad_cells import shown
from offtower.data.formats.casts import relisted
from offtower.data.formats.kinds import ColumnKind, feature_kinds, log_kinds
from offtower.data.formats.options import FileFormat
from offtower.data.parquet_checksums import UNREADABLE
from offtower.data.schema import LogSchema
from offtower.errors import DataError

if TYPE_CHECKING:
    from offtower.retrieval.retriever import Retriever


def read_contexts(
    text: str, retriever: Retriever, file_format: FileFormat | None = None, *, rows: int
) -> Iterator[pa.Table]:
    """Read contexts in tables of at most `rows` rows.

    Args:
        text: a file, a folder, or JSON of one context or a list of them.
        retriever: says which columns are needed; further ones are kept as they stand.
        file_format: of text files.

    Raises:
        DataError: there are none, they cannot be read, or a value is none of its column's kind.
    """
    as_json = text.lstrip().startswith(("{", "["))
    batches = (
        _of_json(text, retriever).to_batches(max_chunksize=rows)
        if as_json
        else _of_files(text, retriever, file_format, rows)
    )
    empty = True
    try:
        for batch in batches:
            if batch.num_rows:
                empty = False
                yield _with_ids(pa.Table.from_batches([batch]), retriever)
    except UNREADABLE as error:
        raise DataError(f"the contexts in '{text}' cannot be read: {error}") from error
    if empty:
        raise DataError("--contexts has no rows")


def _of_json(text: str, retriever: Retriever) -> pa.Table:
    from offtower.data.formats.json_lines import objects_table

    try:
        content = json.loads(text)
        objects = content if isinstance(content, list) else [content]
        kinds = _kinds(retriever, {name for one in objects for name in one})
        return objects_table(objects, {n: kind for n, kind in kinds.items() if kind != "time"})
    except DataError as error:
        raise DataError(f"--contexts: {error}") from None
    except (ValueError, RecursionError, TypeError, OverflowError) as error:
        raise DataError(f"--contexts is not valid JSON of contexts: {error}") from error


def _of_files(
    text: str, retriever: Retriever, file_format: FileFormat | None, rows: int
) -> Iterable[pa.RecordBatch]:
    from offtower.data.source import column_names, open_source

    kinds = _kinds(retriever, column_names(text, file_format))
    source = open_source(text, kinds, file_format, further=True)
    return chain.from_iterable(source.batches(unit, most_rows=rows) for unit in range(len(source)))


def _kinds(retriever: Retriever, names: Iterable[str]) -> dict[str, ColumnKind]:
    """Kinds of the features, and of those of `names` that say which items are eligible."""
    encoding = retriever.tower.encoding
    kinds = feature_kinds(encoding.specs)
    if encoding.timestamp is not None:
        kinds[encoding.timestamp] = "time"
    if retriever.eligible is not None:
        schema = LogSchema.from_dict(retriever.manifest["log_schema"])
        wanted = {*retriever.eligible.section.log_columns, schema.timestamp} & set(names)
        kinds |= {name: kind for name, kind in log_kinds(schema).items() if name in wanted}
    return kinds


def _with_ids(table: pa.Table, retriever: Retriever) -> pa.Table:
    """The table with ids and categories of eligible items as text or integers, as the items'."""
    if retriever.eligible is None:
        return table
    for name, text in retriever.eligible.id_columns().items():
        if name not in table.column_names:
            continue
        column = as_array(table.column(name))
        listed = is_list(column.type)
        kind = column.type.value_type if listed else column.type
        if is_text(kind) == text and not pa.types.is_floating(kind):
            continue
        cells = column.flatten() if listed else column
        values, bad = as_categories(cells, "text" if text else "int64")
        if bad.any():
            value: Any = cells[int(np.argmax(bad))].as_py()
            wanted = "text" if text else "an integer"
            raise DataError(f"'{name}' holds {shown(value)}, expected {wanted}, as the items have")
        cast = relisted(column, values, None)[0] if listed else values
        table = table.set_column(table.column_names.index(name), name, cast)
    return table
