"""Exact search over memory-mapped item vectors of any precision, by `ops.top_k`."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offtower import ops
from offtower.ops.policy import slice_top_k

CHUNK = 262_144


def exact_top_k(
    queries: NDArray[np.float32],
    vectors: NDArray[Any],
    k: int,
    scale: NDArray[np.float32] | None = None,
    eligible: ops.Eligibility | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the k items of largest inner product, a chunk of items at a time.

    Args:
        queries: (n, D).
        vectors: (N, D) float32, float16 or int8.
        k: at most N.
        scale: (D,) scale of int8 vectors.
        eligible: the items that each query may find. With candidate lists only their vectors are
            read.

    Returns:
        Descending scores (n, k) and item numbers (n, k); ties go to the lowest number; -inf and -1
        pad queries with fewer than k eligible items.
    """
    if scale is not None:
        queries = queries * scale
    wanted = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
    if eligible is not None:
        return _among(wanted, vectors, k, eligible)
    if vectors.dtype == np.float32:
        score, index = ops.top_k(wanted, _tensor(vectors), k)
        return score.numpy(), index.numpy()
    best = wanted.new_empty(len(queries), 0)
    items = wanted.new_empty(len(queries), 0, dtype=torch.int64)
    for first in range(0, len(vectors), CHUNK):
        part = torch.from_numpy(vectors[first : first + CHUNK].astype(np.float32))
        score, index = ops.top_k(wanted, part, min(k, len(part)))
        best, items = _better(best, items, score, index + first, k)
    return best.numpy(), items.numpy()


def _among(
    queries: torch.Tensor, vectors: NDArray[Any], k: int, eligible: ops.Eligibility
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`exact_top_k` among eligible items."""
    best = queries.new_full((len(queries), k), float("-inf"))
    items = torch.full((len(queries), k), -1, dtype=torch.int64)
    lists = eligible.resolved().candidates
    if lists is not None:
        distinct, own = lists.compact()
        if len(distinct):
            part = torch.from_numpy(vectors[distinct.numpy()].astype(np.float32))
            few = min(k, len(part))
            score, index = slice_top_k(queries, part, few, ops.Eligibility(candidates=own))
            best[:, :few] = score
            items[:, :few] = torch.where(index < 0, -1, distinct[index.clamp_min(0)])
        return best.numpy(), items.numpy()
    for first in range(0, len(vectors), CHUNK):
        stop = min(first + CHUNK, len(vectors))
        chunk = _tensor(np.asarray(vectors[first:stop], dtype=np.float32))
        own_slice = eligible.slice_items(first, stop)
        score, index = slice_top_k(queries, chunk, min(k, stop - first), own_slice)
        best, items = _better(best, items, score, torch.where(index < 0, -1, index + first), k)
    return best.numpy(), items.numpy()


def _better(
    best: torch.Tensor, items: torch.Tensor, score: torch.Tensor, index: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of those so far and of a later chunk; ties go to the earlier one."""
    best, items = torch.cat([best, score], 1), torch.cat([items, index], 1)
    order = torch.argsort(best, dim=1, descending=True, stable=True)[:, :k]
    return best.gather(1, order), items.gather(1, order)


def recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) share of the true items (n, k) among those found (n, m); -1 pads."""
    hits = [np.isin(row, got).mean() for row, got in zip(truth, found, strict=True)]
    return np.asarray(hits, dtype=np.float64)


def _tensor(array: NDArray[np.float32]) -> torch.Tensor:
    """Wrap a read-only array without torch's warning that it is not writable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
