"""Rows of the catalogue: which, and their logits, without copying them where FAISS can do it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def score_rows(
    vectors: FloatArray, query: FloatArray, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """<query, vectors[row]> of each row, (n,) float64 of float32 products.

    Args:
        vectors: (N, D), C-contiguous; may be memory-mapped.
        query: (D,) float32.
        rows: (n,), best in runs.
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
    """FAISS where this process has loaded it already, or can."""
    if "faiss" in sys.modules:
        return sys.modules["faiss"]
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def ranges(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """first[0], first[0] + 1, ... for count[0] numbers, then those of the next, ..."""
    ends = np.cumsum(count)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - (ends - count), count)


def runs(
    start: NDArray[np.int64],
    size: NDArray[np.int64],
    first: NDArray[np.int64],
    count: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Rows of a run in each cell, from place `first`, around the cell's end to its beginning."""
    place = ranges(first, count)
    limit = np.repeat(size, count)
    place -= np.where(place >= limit, limit, 0)
    return place + np.repeat(start, count)


def contains(sorted_rows: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) which rows are among the sorted ones."""
    if len(sorted_rows) == 0:
        return np.zeros(len(rows), dtype=bool)
    found = np.minimum(np.searchsorted(sorted_rows, rows), len(sorted_rows) - 1)
    return np.asarray(sorted_rows[found] == rows)
