"""Detection of one-hot and multi-hot matrices, and conversion to ids and bags."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MIN_COLUMNS = 16
"""Narrower matrices are numbers."""

MAX_DENSITY = 0.2
"""Matrices with a larger share of ones are numbers."""

_ROWS_AT_ONCE = 4096


def is_indicator(matrix: NDArray[np.generic]) -> bool:
    """Whether a matrix (rows, columns) has only zeros and few ones."""
    if matrix.ndim != 2 or matrix.shape[1] < MIN_COLUMNS or len(matrix) == 0:
        return False
    ones = 0
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        part = matrix[start : start + _ROWS_AT_ONCE]
        hot = part == 1
        if not (hot | (part == 0)).all():
            return False
        ones += int(hot.sum())
    return ones <= MAX_DENSITY * matrix.size


def is_one_hot(matrix: NDArray[np.generic]) -> bool:
    """Whether each row has exactly one one."""
    return is_indicator(matrix) and bool(((matrix == 1).sum(axis=1) == 1).all())


def as_ids(matrix: NDArray[np.generic]) -> pa.Array:
    """Return the (rows,) column of each row's one; null unless there is exactly one."""
    hot = matrix == 1
    return pa.array(hot.argmax(axis=1), mask=hot.sum(axis=1) != 1)


def as_tokens(matrix: NDArray[np.generic]) -> pa.Array:
    """Return (rows,) lists of the columns with a one."""
    rows, columns = np.nonzero(matrix == 1)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(columns))
