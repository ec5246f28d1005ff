"""Conversion of Arrow columns to NumPy arrays."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.errors import DataError

Column: TypeAlias = pa.Array | pa.ChunkedArray


def as_array(column: Column) -> pa.Array:
    """Return the column as one contiguous array."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_string(column.type) and column.nbytes >= 2**31:
        column = column.cast(pa.large_string())  # 32-bit offsets would overflow
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def null_mask(column: Column) -> NDArray[np.bool_]:
    """(n,) mask of the null rows."""
    nulls: NDArray[np.bool_] = pc.is_null(as_array(column)).to_numpy(zero_copy_only=False)
    return nulls


def is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether categories or ids of this type are text; they are integers otherwise."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


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
    """Convert numbers to (n,) float64; null becomes NaN."""
    array = pc.cast(as_array(column), pa.float64(), safe=False)
    numbers: NDArray[np.float64] = array.to_numpy(zero_copy_only=False)
    return numbers


def as_float_matrix(column: Column, dim: int | None, name: str) -> NDArray[Any]:
    """Convert lists of equal length to (n, dim) float32 where they hold such, else to float64.

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
    narrow = pa.types.is_float32(flat.type) or pa.types.is_float16(flat.type)
    array = pc.cast(flat, pa.float32() if narrow else pa.float64(), safe=False)
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values.reshape(n, width)


def list_parts(column: Column) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the concatenated values of all lists, and offsets (n + 1,); a null list is empty."""
    array = as_array(column)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return array.flatten(), offsets


def category_values(column: Column) -> pa.Array:
    """Convert text to string (or large_string), integers and booleans to int64.

    Unsigned 64-bit integers keep their bits: those of 2**63 and more become negative.
    """
    array = as_array(column)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_uint64(array.type):
        return array.view(pa.int64())
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        return pc.cast(array, pa.int64())
    if pa.types.is_large_string(array.type) and array.nbytes >= 2**31:
        return array
    return pc.cast(array, pa.string())


CategoryType = Literal["text", "int64", "uint64", "bool"]
"""Types that categories and ids have; 5, "5" and 5.0 are one value in each of the first three."""

_INTEGER = r"^(?:0|-?[1-9][0-9]{0,19})$"
"""Integers as they are written without choice: 007 is none."""


def category_type(kind: pa.DataType) -> CategoryType | None:
    """Type of the categories of a column; None where it says none."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_text(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_uint64(kind):
        return "uint64"
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "int64"
    return None


def as_categories(column: Column, wanted: CategoryType) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Cast values to a type of categories.

    Returns:
        (n,) values as `category_values` has them, null where a value has no equal of the type; and
        the (n,) mask of those: texts such as 007 and fractions as integers, integers out of range.
    """
    array = as_array(column)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    found = array.type
    none = np.zeros(len(array), dtype=bool)
    if is_category(found) and (category_type(found), wanted) in _ALIKE:
        return category_values(array), none
    valid = pc.is_valid(array)
    if pa.types.is_floating(found):
        # NaN is how pandas writes a missing integer.
        valid = pc.invert(pc.is_nan(pc.fill_null(array, float("nan"))))
        whole = pc.and_(pc.equal(pc.round(array), array), pc.less(pc.abs(array), 2.0**53))
        array = pc.cast(pc.if_else(whole, array, pa.scalar(None, found)), pa.int64())
    elif pa.types.is_decimal(found):
        numbers = [None if n is None or n != int(n) else str(int(n)) for n in array.to_pylist()]
        array = pa.array(numbers, pa.string())
    elif pa.types.is_string_view(found):
        array = pc.cast(array, pa.string())
    values = pc.cast(array, _CATEGORIES[wanted]) if pa.types.is_null(found) else None
    if values is None:
        from_text = is_text(array.type)
        values = (_from_text if from_text else _from_integers)(array, wanted)
    bad: NDArray[np.bool_] = pc.and_(valid, pc.is_null(values)).to_numpy(zero_copy_only=False)
    return category_values(values), bad


_CATEGORIES: dict[CategoryType, pa.DataType] = {
    "text": pa.string(),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "bool": pa.bool_(),
}
_ALIKE = {(kind, kind) for kind in _CATEGORIES} | {("bool", "int64")}


def _from_text(values: pa.Array, wanted: CategoryType) -> pa.Array:
    kind = _CATEGORIES[wanted]
    if wanted == "text":
        return values
    null = pa.scalar(None, values.type)
    if wanted == "bool":
        lower = pc.ascii_lower(values)
        known = pc.is_in(lower, value_set=pa.array(["true", "false"], lower.type))
        return pc.cast(pc.if_else(known, lower, null), kind)
    kept = pc.if_else(pc.match_substring_regex(values, _INTEGER), values, null)
    try:
        return pc.cast(kept, kind)
    except pa.ArrowInvalid:
        low, high = (-(2**63), 2**63) if wanted == "int64" else (0, 2**64)
        numbers = [None if text is None else int(text) for text in kept.to_pylist()]
        return pa.array([n if n is not None and low <= n < high else None for n in numbers], kind)


def _from_integers(values: pa.Array, wanted: CategoryType) -> pa.Array:
    kind = _CATEGORIES[wanted]
    if wanted == "text":
        return pc.cast(values, kind)
    if pa.types.is_boolean(values.type):
        return pc.cast(pc.cast(values, pa.int64()), kind)
    if wanted == "bool":
        inside = pc.or_(pc.equal(values, 0), pc.equal(values, 1))
    elif pa.types.is_uint64(values.type):
        inside = pc.less_equal(values, pa.scalar(2**63 - 1, pa.uint64()))
    elif wanted == "uint64":
        inside = pc.greater_equal(values, 0)
    else:
        return pc.cast(values, kind)
    return pc.cast(pc.if_else(inside, values, pa.scalar(None, values.type)), kind)


def distinct_values(column: Column) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the distinct values without null, and the (n,) index of each row's value in them.

    Null has the index `len(values)`, so that results for the values can be extended by one for
    null. Dictionary columns are not decoded.
    """
    array = as_array(column)
    if pa.types.is_dictionary(array.type) and array.dictionary.null_count == 0:
        values, indices = category_values(array.dictionary), array.indices
    else:
        encoded = pc.dictionary_encode(category_values(array))
        values, indices = encoded.dictionary, encoded.indices
    indices = pc.fill_null(pc.cast(indices, pa.int64()), len(values))
    return values, indices.to_numpy(zero_copy_only=False)


def hash_values(values: pa.Array) -> NDArray[np.uint64]:
    """Hash values to 64 bits, equally on every machine and in every process.

    Integers of any width hash by splitmix64 (Steele, Lea, Flood 2014) of their 64 bits. Text is
    cut into 8-byte little-endian words of its UTF-8 bytes, padded with zeros, and chained:
    h = splitmix64(h ^ word), from h = splitmix64(number of bytes). The integer 5 and the text "5"
    differ. Null hashes like 0 or like "".
    """
    if not is_text(values.type):
        plain = pc.fill_null(values, 0).to_numpy(zero_copy_only=False).astype(np.int64)
        return splitmix64(plain.view(np.uint64))
    n = len(values)
    if n == 0:
        return np.zeros(0, dtype=np.uint64)
    wide = pc.cast(pc.fill_null(values, ""), pa.large_string())
    _, offset_buffer, data = wide.buffers()
    ends = np.frombuffer(offset_buffer, dtype=np.int64)[wide.offset : wide.offset + n + 1]
    first, last = int(ends[0]), int(ends[-1])
    starts, lengths = ends[:-1] - first, np.diff(ends)
    padded = np.zeros(last - first + 8, dtype=np.uint8)
    if last > first:
        padded[:-8] = np.frombuffer(data, dtype=np.uint8)[first:last]
    # One word at every byte: unaligned reads, without a loop over rows.
    words = np.lib.stride_tricks.as_strided(
        padded[:8].view("<u8"), shape=(len(padded) - 7,), strides=(1,), writeable=False
    )
    key = splitmix64(lengths.astype(np.uint64))
    active = np.flatnonzero(lengths > 0)
    done = 0
    while active.size:
        word = words[starts[active] + done]
        left = np.minimum(lengths[active] - done, 8).astype(np.uint64)
        unused = (np.uint64(8) - left) * np.uint64(8)
        word = (word << unused) >> unused  # bytes of the next text
        key[active] = splitmix64(key[active] ^ word)
        done += 8
        active = active[lengths[active] > done]
    return key


SPLITMIX_STEP = 0x9E3779B97F4A7C15
"""Between the states of SplitMix64."""


def hashed(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Hash values to stable 64-bit keys; null has the key 0."""
    distinct, index = distinct_values(column)
    return np.append(hash_values(distinct), np.uint64(0))[index]


def splitmix64(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of 64-bit keys (Steele, Lea, Flood 2014, "Fast splittable PRNGs")."""
    with np.errstate(over="ignore"):
        z = key + np.uint64(SPLITMIX_STEP)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z


def timestamps(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Convert times to int64: timestamps to microseconds, numbers as they are."""
    array = as_array(column)
    if pa.types.is_timestamp(array.type):
        array = pc.cast(array, pa.timestamp("us", tz=array.type.tz), safe=False)
    return integers(array)


def integers(column: Column) -> NDArray[np.int64]:
    array = pc.cast(as_array(column), pa.int64(), safe=False)
    numbers: NDArray[np.int64] = array.to_numpy(zero_copy_only=False)
    return numbers
