"""K-means over parts of the points, which any process computes.

Lloyd's iterations: each part assigns its points and sums them by centroid in float64, and the sums
are added in the order of the parts, so that the centroids have the same bits for any number of
workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from offtower.mapping import Mapper
from offtower.retrieval.index import import_faiss
from offtower.retrieval.vector_source import VectorSource

ITERATIONS = 10
_NUDGE = np.float32(1.0 / 1024.0)
"""Relative difference of the centroids that a large cluster and an empty one get from it."""


@dataclass(frozen=True)
class Padded:
    """Points of a source, with zeros up to `width` columns."""

    source: VectorSource
    width: int

    def __call__(self, rows: range | NDArray[np.int64]) -> NDArray[np.float32]:
        points = self.source.float32(rows)
        missing = self.width - points.shape[1]
        return points if missing == 0 else np.pad(points, ((0, 0), (0, missing)))


def nearest(
    points: Padded, centroids: NDArray[np.float32], rows: range | NDArray[np.int64]
) -> NDArray[np.int32]:
    """(n,) the centroid with the least Euclidean distance from each point."""
    return nearest_of(points(rows), centroids)


def fit_centroids(
    points: Padded, parts: Sequence[NDArray[np.int64]], clusters: int, seed: int, mapper: Mapper
) -> NDArray[np.float32]:
    """Return (clusters, width) centroids.

    Args:
        parts: rows of the points to cluster, at least as many as clusters.
        seed: of the points that are the first centroids.
    """
    rows = np.concatenate(parts)
    first = np.random.default_rng(seed).choice(len(rows), clusters, replace=False)
    centroids = points(np.sort(rows[first]))
    for _ in range(ITERATIONS):
        total = np.zeros((clusters, points.width))
        count = np.zeros(clusters, dtype=np.int64)
        work = partial(_sums, points, centroids)
        for some, number in mapper.map(work, parts, "clustering items"):
            total += some
            count += number
        filled = count > 0
        centroids = centroids.copy()
        centroids[filled] = total[filled] / count[filled, None]
        _fill_empty(centroids, count)
    return centroids


def nearest_of(points: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int32]:
    """(n,) as `nearest`, of points (n, width) in memory."""
    faiss = import_faiss()
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    found = index.search(np.ascontiguousarray(points), 1)[1][:, 0]
    return np.asarray(found, dtype=np.int32)


def _sums(
    points: Padded, centroids: NDArray[np.float32], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sum and number of a part's points by centroid."""
    some = points(rows)
    cluster = nearest_of(some, centroids)
    order = np.argsort(cluster, kind="stable")
    there, start = np.unique(cluster[order], return_index=True)
    total = np.zeros(centroids.shape)
    total[there] = np.add.reduceat(some[order].astype(np.float64), start, axis=0)
    return total, np.bincount(cluster, minlength=len(centroids))


def _fill_empty(centroids: NDArray[np.float32], count: NDArray[np.int64]) -> None:
    """Split the largest clusters, one for each empty one; changes the centroids in place."""
    size = count.astype(np.float64)
    signs = np.where(np.arange(centroids.shape[1]) % 2, -_NUDGE, _NUDGE)
    for empty in np.flatnonzero(count == 0):
        largest = int(np.argmax(size))
        centroids[empty] = centroids[largest] * (1 + signs)
        centroids[largest] *= 1 - signs
        size[empty] = size[largest] = size[largest] / 2
