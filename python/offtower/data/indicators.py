"""Matrices of zeros and ones as what they stand for: ids and bags of tokens."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MIN_COLUMNS = 16
"""A narrower matrix is taken as numbers."""

MAX_DENSITY = 0.2
"""Share of ones beyond which a matrix is taken as numbers."""

_ROWS_AT_ONCE = 4096


def is_indicator(matrix: NDArray[np.generic]) -> bool:
    """Whether a matrix (rows, columns) holds nothing but zeros and, sparsely, ones."""
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
    """Whether each row is the indicator of one id."""
    return is_indicator(matrix) and bool(((matrix == 1).sum(axis=1) == 1).all())


def as_ids(matrix: NDArray[np.generic]) -> pa.Array:
    """(rows,) column of each row's one; null for a row that has not exactly one."""
    hot = matrix == 1
    return pa.array(hot.argmax(axis=1), mask=hot.sum(axis=1) != 1)


def as_tokens(matrix: NDArray[np.generic]) -> pa.Array:
    """(rows,) lists of the columns with a one."""
    rows, columns = np.nonzero(matrix == 1)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(columns))
