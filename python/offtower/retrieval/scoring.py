"""Logits of selected catalogue rows, without copying the vectors if FAISS is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def score_rows(
    vectors: FloatArray, query: FloatArray, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Inner products <query, vectors[row]>, computed in float32, as (n,) float64.

    Args:
        vectors: (N, D), C-contiguous; may be memory-mapped.
        query: (D,) float32.
        rows: (n,); fastest in runs of consecutive rows.
    """
    faiss = _faiss()
    if faiss is None or not vectors.flags.c_contiguous or len(rows) == 0:
        return np.asarray(np.take(vectors, rows, axis=0) @ query, dtype=np.float64)
    out = np.empty(len(rows), dtype=np.float32)
    rows = np.ascontiguousarray(rows, dtype=np.int64)
    faiss.fvec_inner_products_by_idx(
        faiss.swig_ptr(out),
        faiss.swig_ptr(query),
        faiss.swig_ptr(vectors),
        faiss.swig_ptr(rows),
        vectors.shape[1],
        1,
        len(rows),
    )
    return out.astype(np.float64)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def ranges(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenated ranges: count[0] numbers from first[0], then count[1] from first[1], ..."""
    ends = np.cumsum(count)
    shift: NDArray[np.int64] = np.repeat(first - (ends - count), count)
    return np.arange(len(shift)) + shift


def runs(
    start: NDArray[np.int64],
    size: NDArray[np.int64],
    first: NDArray[np.int64],
    count: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Rows of a circular run in each cell: `count` rows from offset `first` in the cell."""
    offset = ranges(first, count)
    limit = np.repeat(size, count)
    offset -= np.where(offset >= limit, limit, 0)
    return offset + np.repeat(start, count)


def contains(sorted_rows: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether each row is among the sorted ones."""
    if len(sorted_rows) == 0:
        return np.zeros(len(rows), dtype=bool)
    found = np.minimum(np.searchsorted(sorted_rows, rows), len(sorted_rows) - 1)
    return np.asarray(sorted_rows[found] == rows)
