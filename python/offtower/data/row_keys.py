"""Hashes of rows' contents, equal on every machine and in every process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import (
    Column,
    as_array,
    as_float_array,
    hash_values,
    hashed,
    is_category,
    is_list,
    is_number,
    list_parts,
    splitmix64,
    timestamps,
)

Keys = NDArray[np.uint64]


def row_keys(table: pa.Table, names: Sequence[str], *, exact: bool) -> Keys:
    """(n,) hashes of the rows over some columns.

    Args:
        exact: False has numbers count by their value, whole ones exactly and others in float32, and
            null as 0: neither another type of a column nor zeros in place of its nulls change a
            hash.
    """
    total = np.zeros(table.num_rows, dtype=np.uint64)
    for number, name in enumerate(names):
        total += splitmix64(_column_keys(table.column(name), exact) + np.uint64(number))
    return splitmix64(total)


def _column_keys(column: Column, exact: bool) -> Keys:
    """(n,) hashes of a column's values."""
    kind = column.type
    if is_list(kind):
        values, offsets = list_parts(column)
        position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
        keys = splitmix64(_column_keys(values, exact) + splitmix64(position.astype(np.uint64)))
        ends = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(keys, dtype=np.uint64)])
        return np.asarray(ends[offsets[1:]] - ends[offsets[:-1]])
    if pa.types.is_timestamp(kind):
        given = pc.fill_null(as_array(column), 0)
        return timestamps(pa.chunked_array([given])).view(np.uint64)
    if is_category(kind) and (exact or not is_number(kind)):
        return hashed(column)
    if is_number(kind):
        if exact:
            return (as_float_array(column) + 0.0).view(np.uint64)  # -0 is 0.
        return _by_value(column)
    try:
        return hash_values(pc.cast(as_array(column), pa.string()))
    except pa.ArrowException:  # Values of other types do not tell rows apart.
        return np.zeros(len(column), dtype=np.uint64)


def _by_value(column: Column) -> Keys:
    """(n,) keys of numbers that do not depend on their type."""
    if pa.types.is_integer(column.type):
        filled = pc.fill_null(as_array(column), 0).to_numpy(zero_copy_only=False)
        return np.asarray(filled).astype(np.int64, copy=False).view(np.uint64)
    numbers = np.nan_to_num(as_float_array(column), nan=0.0, posinf=np.inf, neginf=-np.inf)
    rounded = np.where(numbers == np.floor(numbers), numbers, numbers.astype(np.float32))
    keys: Keys = rounded.astype(np.float32).view(np.uint32).astype(np.uint64)
    whole = (rounded == np.floor(rounded)) & (np.abs(rounded) < 2.0**63)
    keys[whole] = rounded[whole].astype(np.int64).view(np.uint64)
    return keys
