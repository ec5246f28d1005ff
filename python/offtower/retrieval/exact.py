"""Exact search over memory-mapped item vectors of any precision, by `ops.top_k`."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offtower import ops

CHUNK = 262_144


def exact_top_k(
    queries: NDArray[np.float32],
    vectors: NDArray[Any],
    k: int,
    scale: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the k items of largest inner product, a chunk of items at a time.

    Args:
        queries: (n, D).
        vectors: (N, D) float32, float16 or int8.
        k: at most N.
        scale: (D,) scale of int8 vectors.

    Returns:
        Descending scores (n, k) and item numbers (n, k); ties go to the lowest number.
    """
    if scale is not None:
        queries = queries * scale
    wanted = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
    if vectors.dtype == np.float32:
        score, index = ops.top_k(wanted, _tensor(vectors), k)
        return score.numpy(), index.numpy()
    best = wanted.new_empty(len(queries), 0)
    items = wanted.new_empty(len(queries), 0, dtype=torch.int64)
    for first in range(0, len(vectors), CHUNK):
        part = torch.from_numpy(vectors[first : first + CHUNK].astype(np.float32))
        score, index = ops.top_k(wanted, part, min(k, len(part)))
        best, items = torch.cat([best, score], 1), torch.cat([items, index + first], 1)
        # Stable: ties go to the earlier chunk.
        order = torch.argsort(best, dim=1, descending=True, stable=True)[:, :k]
        best, items = best.gather(1, order), items.gather(1, order)
    return best.numpy(), items.numpy()


def recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) share of the true items (n, k) among those found (n, m); -1 pads."""
    hits = [np.isin(row, got).mean() for row, got in zip(truth, found, strict=True)]
    return np.asarray(hits, dtype=np.float64)


def _tensor(array: NDArray[np.float32]) -> torch.Tensor:
    """Wrap a read-only array without torch's warning that it is not writable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
