"""Logits of chosen rows of the catalogue, without copying them where FAISS can do it."""

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
