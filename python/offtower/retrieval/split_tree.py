"""A tree of median splits along principal directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.retrieval.cells import FloatArray, IntArray

_ROWS_PER_LEAF = 100
"""Items per leaf that the tree is fitted on; larger catalogues are subsampled."""
_DIRECTION_ROWS = 4_000
"""Items per split that the principal direction is computed from."""
_CHUNK = 262_144


@dataclass(frozen=True, eq=False)
class SplitTree:
    """A complete binary tree with 2^depth leaves; its nodes are numbered level by level."""

    direction: FloatArray
    """(2^depth - 1, D)."""
    threshold: FloatArray
    """(2^depth - 1,)."""
    depth: int

    def route(self, points: FloatArray) -> IntArray:
        """(n,) leaf of each point."""
        direction, threshold = self.direction, self.threshold
        leaf = np.zeros(len(points), dtype=np.int64)
        for level in range(self.depth):
            node = leaf + (2**level - 1)
            if 2**level <= 64:
                value = (points @ direction[2**level - 1 : 2 ** (level + 1) - 1].T)[
                    np.arange(len(points)), leaf
                ]
            else:
                value = np.einsum("nd,nd->n", points, direction[node])
            leaf = 2 * leaf + (value >= threshold[node])
        return leaf


def fit_split_tree(
    vectors: FloatArray, root: NDArray[np.float64], depth: int, rng: np.random.Generator
) -> SplitTree:
    """Fit the tree on vectors v or a sample of them, by the variance of root v.

    Args:
        vectors: (N, D).
        root: (D, D), symmetric; folded into the directions, which apply to v.
    """
    n = len(vectors)
    rows = np.arange(n)
    if n > _ROWS_PER_LEAF << depth:
        rows = np.sort(rng.choice(n, _ROWS_PER_LEAF << depth, replace=False))
    points = np.empty((len(rows), vectors.shape[1]), dtype=np.float32)
    for first in range(0, len(rows), _CHUNK):
        points[first : first + _CHUNK] = vectors[rows[first : first + _CHUNK]] @ root
    direction, threshold = _split_tree(points, depth, rng)
    return SplitTree((direction @ root).astype(np.float32), threshold, depth)


def _split_tree(
    points: FloatArray, depth: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Directions (2^depth - 1, D) and thresholds of a tree of median splits, in level order."""
    nodes = 2**depth - 1
    direction = np.zeros((nodes, points.shape[1]), dtype=np.float32)
    threshold = np.zeros(nodes, dtype=np.float32)
    order = np.arange(len(points))
    parts = [(0, len(points))]
    node = 0
    for _ in range(depth):
        halves = []
        for first, last in parts:
            half = (first + last) // 2
            if last - first > 1:
                inside = points[order[first:last]]
                direction[node] = _principal_direction(inside, rng)
                value = inside @ direction[node]
                by_value = np.argpartition(value, half - first)
                order[first:last] = order[first:last][by_value]
                threshold[node] = value[by_value[half - first]]
            halves += [(first, half), (half, last)]
            node += 1
        parts = halves
    return direction, threshold


def _principal_direction(points: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Approximate first principal component, by eight power iterations."""
    some = points[:_DIRECTION_ROWS]
    centered = some - some.mean(axis=0)
    scatter = centered.T @ centered
    vector: FloatArray = rng.standard_normal((points.shape[1],), dtype=np.float32)
    for _ in range(8):
        vector = np.asarray(scatter @ vector)
        length = float(np.linalg.norm(vector))
        if not length > 0.0:
            return np.zeros_like(vector)
        vector /= length
    return vector
