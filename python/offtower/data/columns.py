"""Arrow columns -> NumPy, one function a shape of column."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.errors import DataError

Column = pa.Array | pa.ChunkedArray


def as_array(column: Column) -> pa.Array:
    """One contiguous array."""
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return column


def is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_category(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
    )


def as_float_array(column: Column) -> NDArray[np.float64]:
    """Numbers (n,) as float64; null becomes NaN."""
    array = pc.cast(as_array(column), pa.float64(), safe=False)
    return array.to_numpy(zero_copy_only=False)


def as_float_matrix(column: Column, dim: int | None, name: str) -> NDArray[np.float32]:
    """Lists of equal length -> (n, dim) float32.

    Raises:
        DataError: a row is null or has another length than `dim` (or than the first row).
    """
    array = as_array(column)
    n = len(array)
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
        if dim is not None and width != dim:
            raise DataError(f"feature '{name}' has vectors of {width} numbers, expected {dim}")
        if array.null_count:
            raise DataError(f"feature '{name}' has {array.null_count} null vectors")
        flat = array.flatten()
    else:
        lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
        width = dim if dim is not None else (int(lengths[0]) if n else 0)
        wrong = np.flatnonzero(lengths != width)
        if wrong.size:
            raise DataError(
                f"feature '{name}' has a vector of {lengths[wrong[0]]} numbers in row {wrong[0]}, "
                f"expected {width}"
            )
        flat = array.flatten()
    values = pc.cast(flat, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    return values.reshape(n, width)


def list_parts(column: Column) -> tuple[pa.Array, NDArray[np.int64]]:
    """Values of all lists, one after the other, and offsets (n + 1,); a null list is empty."""
    array = as_array(column)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return array.flatten(), offsets


def category_values(column: Column) -> pa.Array:
    """Text as string, integers and booleans as int64; dictionaries decoded."""
    array = as_array(column)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        return pc.cast(array, pa.int64())
    return pc.cast(array, pa.string())


def hash_values(values: pa.Array) -> NDArray[np.uint64]:
    """A stable 64-bit hash of text or integers: the same on every machine and Python.

    Text is hashed by SipHash (pandas' `hash_array` with its fixed key), integers by splitmix64
    (Steele et al. 2014). Null hashes like 0.
    """
    if pa.types.is_integer(values.type):
        plain = pc.fill_null(values, 0).to_numpy(zero_copy_only=False).astype(np.int64)
        return splitmix64(plain.view(np.uint64))
    text = np.asarray(pc.fill_null(values, "").to_numpy(zero_copy_only=False), dtype=object)
    if text.size == 0:
        return np.zeros(0, dtype=np.uint64)
    return pd.util.hash_array(text, categorize=False).astype(np.uint64)


def splitmix64(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes the bits of 64-bit keys (Steele, Lea, Flood 2014, "Fast splittable PRNGs")."""
    with np.errstate(over="ignore"):
        z = key + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
