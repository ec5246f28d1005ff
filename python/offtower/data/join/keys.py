"""Hashes of the columns of a key, and their search.

Keys are compared by 128 bits of hash, whose chance of a collision among 1e9 keys is 1e-21.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import (
    as_float_array,
    distinct_values,
    hash_values,
    is_category,
    is_text,
    splitmix64,
)
from offtower.data.outcomes import comparable_times

_SEEDS = (np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344))
"""First digits of pi: the two hashes of a key start differently."""


def find_keys(keys: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(n,) index of each wanted key in sorted distinct keys; -1 where it is none."""
    found = np.full(len(wanted), -1, dtype=np.int64)
    if not len(keys):
        return found
    # Equal first halves are compared by their second ones; there is hardly more than one of each.
    at = np.searchsorted(keys[:, 0], wanted[:, 0])
    open_ = np.arange(len(wanted))
    while open_.size:
        inside = open_[at[open_] < len(keys)]
        inside = inside[keys[at[inside], 0] == wanted[inside, 0]]
        hit = keys[at[inside], 1] == wanted[inside, 1]
        found[inside[hit]] = at[inside[hit]]
        open_ = inside[~hit]
        at[open_] += 1
    return found


def hash_rows(columns: list[pa.ChunkedArray]) -> NDArray[np.uint64]:
    """(n, 2) hashes of the rows of some columns: text and integers by value, others by bits."""
    n = len(columns[0])
    found = np.empty((n, 2), dtype=np.uint64)
    found[:] = _SEEDS
    for column in columns:
        distinct = distinct_values if is_category(column.type) else _distinct_bits
        values, index = distinct(column)
        for half, seed in enumerate(_SEEDS):
            # Text is hashed anew for each half, with another first word: equal halves of two texts
            # must not imply that the others are equal.
            of_value = hash_values(_salted(values, half))
            key = np.append(splitmix64(of_value ^ seed), seed)[index]
            found[:, half] = splitmix64(found[:, half] ^ key)
    return found


def _salted(values: pa.Array, half: int) -> pa.Array:
    if half == 0 or not is_text(values.type):
        return values
    first, end = (pa.scalar(text, pa.large_string()) for text in ("offtower", ""))
    return pc.binary_join_element_wise(first, pc.cast(values, pa.large_string()), end)


def _distinct_bits(column: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int64]]:
    numbers = (
        comparable_times(column)
        if pa.types.is_temporal(column.type)
        else as_float_array(column).view(np.int64)
    )
    return distinct_values(pa.array(numbers))
