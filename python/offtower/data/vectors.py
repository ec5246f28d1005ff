"""Vector features: which rows of a list column hold unusable vectors, and why."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import Column, as_array, as_float_array

Mask = NDArray[np.bool_]

LARGEST = float(np.finfo(np.float32).max)
"""Features become float32; larger numbers would become infinite."""


def bad_vectors(column: Column, dim: int | None) -> Mask:
    """Return the (n,) mask of lists that are null, not of length `dim`, or not finite in float32.

    Without `dim` the most frequent length is expected.
    """
    bad = np.zeros(len(column), dtype=bool)
    for rows in vector_kinds(column, dim).values():
        bad |= rows
    return bad


def vector_kinds(column: Column, dim: int | None) -> dict[str, Mask]:
    """Return masks of unusable vectors by problem."""
    array = as_array(column)
    n = len(array)
    # Null lists hide whatever their slot of a fixed-size list holds.
    null = pc.is_null(array).to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
    wanted = dim
    if wanted is None:
        known = lengths[~null]
        wanted = int(np.bincount(known).argmax()) if known.size else 0
    flat = pc.list_flatten(array)
    values = as_float_array(flat)
    usable = np.abs(values) <= LARGEST
    null_inside, infinite, nan = (np.zeros(n, dtype=bool) for _ in range(3))
    if not usable.all():
        parents = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
        nulls = pc.is_null(flat).to_numpy(zero_copy_only=False)
        null_inside[parents[nulls]] = True
        nan[parents[np.isnan(values) & ~nulls]] = True
        infinite[parents[np.abs(values) > LARGEST]] = True
    return {
        "null": null,
        "of wrong length": (lengths != wanted) & ~null,
        "null inside": null_inside,
        "NaN inside": nan,
        "infinite inside": infinite,
    }
