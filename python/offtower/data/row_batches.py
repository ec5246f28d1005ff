"""Encoded rows as Arrow record batches, to send to other workers and to map from files.

A batch has one row, with a list for each array: lists of any length, mapped without a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.eligible import EligibleItems, EligibleRows
from offtower.data.features import BagArray
from offtower.data.rows import COLUMNS, EncodedRows
from offtower.data.schema import PscoreKind

_SHAPE, _FEATURE = b"shape", b"feature"
"""Metadata of a field: the array's shape, and the context feature that it belongs to."""
_PARTS = ("values", "offsets")
_ELIGIBLE = ("group", "excluded", "candidates")


def to_batch(rows: EncodedRows) -> pa.RecordBatch:
    """Return the rows' arrays, which are not copied where they are contiguous."""
    arrays: dict[str, NDArray[Any]] = {}
    features: dict[str, str] = {}
    for name, feature in rows.context.items():
        _add(arrays, f"context/{name}", feature)
        features |= dict.fromkeys(arrays.keys() - features.keys(), name)
    for name in COLUMNS:
        column = getattr(rows, name)
        if isinstance(column, EligibleRows):
            for part in _ELIGIBLE:
                _add(arrays, f"{name}/{part}", getattr(column, part))
        else:
            _add(arrays, name, column)
    fields, columns = [], []
    for name, array in arrays.items():
        values = pa.array(np.ascontiguousarray(array).reshape(-1))
        offsets = pa.array(np.array([0, array.size], dtype=np.int64))
        columns.append(pa.LargeListArray.from_arrays(offsets, values))
        metadata = {_SHAPE: json.dumps(array.shape).encode()}
        if name in features:
            metadata[_FEATURE] = features[name].encode()
        fields.append(pa.field(name, columns[-1].type, metadata=metadata))
    return pa.record_batch(columns, schema=pa.schema(fields))


def from_batch(
    batch: pa.RecordBatch, items: EligibleItems | None, pscore_kind: PscoreKind | None
) -> EncodedRows:
    """Return the rows of `to_batch`; their arrays are read-only views of the batch.

    Args:
        items: of the rows' eligible items; None without them.
        pscore_kind: as the rows had it.
    """
    arrays = {
        field.name: batch.column(number)
        .values.to_numpy(zero_copy_only=True)
        .reshape(json.loads(field.metadata[_SHAPE]))
        for number, field in enumerate(batch.schema)
    }
    features = dict.fromkeys(
        field.metadata[_FEATURE].decode() for field in batch.schema if _FEATURE in field.metadata
    )
    context: Any = {name: _array(arrays, f"context/{name}") for name in features}
    columns: dict[str, Any] = {name: _array(arrays, name) for name in COLUMNS if name != "eligible"}
    if items is not None:
        parts: Any = [_array(arrays, f"eligible/{part}") for part in _ELIGIBLE]
        columns["eligible"] = EligibleRows(items, *parts)
    return EncodedRows(context=context, pscore_kind=pscore_kind, **columns)


def _add(arrays: dict[str, NDArray[Any]], name: str, value: Any) -> None:
    if isinstance(value, BagArray):
        for part in _PARTS:
            arrays[f"{name}/{part}"] = getattr(value, part)
        for column, values in value.columns.items():
            arrays[f"{name}/columns/{column}"] = values
    elif value is not None:
        arrays[name] = value


def _array(arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any] | BagArray | None:
    if f"{name}/values" in arrays:
        values, offsets = (arrays[f"{name}/{part}"] for part in _PARTS)
        prefix = f"{name}/columns/"
        columns = {key: array for key, array in arrays.items() if key.startswith(prefix)}
        return BagArray(values, offsets, {k.removeprefix(prefix): a for k, a in columns.items()})
    return arrays.get(name)
