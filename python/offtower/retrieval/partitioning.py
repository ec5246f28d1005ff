"""Partition a catalogue into cells.

Each split reduces the expected variance of a logit inside a cell,

    E_u[ u' S_c u ] = tr(M S_c),      M = E[u u'] over the policy's own contexts,

where S_c is the covariance of the item vectors of cell c. This is clustering of M^(1/2) v by
Euclidean distance. A tree of median splits along principal directions does it in seconds for a
million items and gives cells of equal size. The items with the largest Mahalanobis-type distance
(v - m_c)' M (v - m_c) then move to separate outlier cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.data.array_files import WrittenFile, array_writer, map_array
from offtower.retrieval.cells import Cells, FloatArray, IntArray

_SPLIT_ROWS_PER_CELL = 100
"""Items per cell that the split tree is fitted on; larger catalogues are subsampled."""
_DIRECTION_ROWS = 4_000
"""Items per split that the principal direction is computed from."""
_CHUNK = 262_144
_CELLS_PER_OUTLIERS = 256
"""Ordinary cells per outlier cell."""


def default_num_cells(num_items: int) -> int:
    """About 4 sqrt(N), rounded to a power of two, with at least 16 items per cell."""
    wanted = min(4.0 * num_items**0.5, num_items / 16)
    return 1 << round(float(np.log2(max(wanted, 1.0))))


def build_cells(
    vectors: FloatArray,
    queries: FloatArray,
    directory: Path | None = None,
    *,
    num_cells: int | None = None,
    seed: int = 0,
) -> Cells:
    """Partition a catalogue into cells.

    Args:
        vectors: (N, D) item vectors, may be memory-mapped; read in chunks.
        queries: (n, D) representative context embeddings.
        directory: folder for vectors.npy, ordered by cell; None keeps the vectors in memory.
        num_cells: C, rounded to a power of two; None derives it from N.
        seed: seed of the split directions and of the order inside cells.
    """
    n = len(vectors)
    depth = round(float(np.log2(num_cells or default_num_cells(n))))
    rng = np.random.default_rng(seed)
    second = (queries.astype(np.float64).T @ queries.astype(np.float64)) / max(1, len(queries))
    root = _symmetric_root(second)
    second = root @ root
    rows = np.arange(n)
    if n > _SPLIT_ROWS_PER_CELL << depth:
        rows = np.sort(rng.choice(n, _SPLIT_ROWS_PER_CELL << depth, replace=False))
    points = np.empty((len(rows), vectors.shape[1]), dtype=np.float32)
    for first in range(0, len(rows), _CHUNK):
        points[first : first + _CHUNK] = vectors[rows[first : first + _CHUNK]] @ root
    direction, threshold = _split_tree(points, depth, rng)
    del points, rows
    # Fold M^(1/2) into the directions, so that they apply to v.
    direction = (direction @ root).astype(np.float32)
    cell = np.empty(n, dtype=np.int32)
    for first in range(0, n, _CHUNK):
        cell[first : first + _CHUNK] = _route(
            np.asarray(vectors[first : first + _CHUNK]), direction, threshold, depth
        )
    outlier_cells = _separate_outliers(vectors, cell, root, 2**depth)
    # Shuffle inside each cell: any run of rows is then a random sample of it.
    number: Any = np.int32 if n < 2**31 else np.int64
    order = np.arange(n, dtype=number)
    rng.shuffle(order)
    order = order[np.argsort(cell[order], kind="stable")]
    size = np.bincount(cell)
    start = np.append(0, np.cumsum(size[size > 0]))
    del cell
    row_of_item = np.empty(n, dtype=number)
    row_of_item[order] = np.arange(n, dtype=number)
    ordered = _reordered(vectors, order, directory)
    mean, logit_variance, covariance = _moments(ordered, start, root, outlier_cells)
    return Cells(
        ordered,
        order,
        row_of_item,
        start,
        mean,
        logit_variance,
        covariance,
        float(np.sum(second * covariance)),
        outlier_cells,
    )


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


def _route(
    points: FloatArray, direction: FloatArray, threshold: FloatArray, depth: int
) -> IntArray:
    """(n,) leaf of each point."""
    leaf = np.zeros(len(points), dtype=np.int64)
    for level in range(depth):
        node = leaf + (2**level - 1)
        if 2**level <= 64:
            value = (points @ direction[2**level - 1 : 2 ** (level + 1) - 1].T)[
                np.arange(len(points)), leaf
            ]
        else:
            value = np.einsum("nd,nd->n", points, direction[node])
        leaf = 2 * leaf + (value >= threshold[node])
    return leaf


def _separate_outliers(
    vectors: FloatArray, cell: NDArray[np.int32], root: NDArray[np.float64], cells: int
) -> int:
    """Move the items farthest from their cells' means to new cells, numbered from `cells`.

    Changes `cell` (N,) in place and returns the number of new cells.
    """
    n = len(cell)
    made = max(1, cells // _CELLS_PER_OUTLIERS) if cells >= 16 else 0
    count = made * n // (cells + made)
    made = min(made, count)
    if made == 0:
        return 0
    size = np.bincount(cell, minlength=cells)
    total = np.zeros((cells, vectors.shape[1]))
    for first in range(0, n, _CHUNK):
        part = cell[first : first + _CHUNK]
        order = np.argsort(part, kind="stable")
        there, start = np.unique(part[order], return_index=True)
        total[there] += np.add.reduceat(
            np.asarray(vectors[first : first + _CHUNK], dtype=np.float64)[order], start
        )
    mean = total / np.maximum(size, 1)[:, None]
    far = np.empty(n, dtype=np.float32)
    for first in range(0, n, _CHUNK):
        rows = slice(first, first + _CHUNK)
        far[rows] = np.square((vectors[rows] - mean[cell[rows]]) @ root).sum(axis=1)
    order = np.argpartition(-far, count - 1)[:count]
    # Sorted by distance, so that an outlier cell holds items of similar distance.
    cell[order[np.argsort(far[order], kind="stable")]] = cells + np.arange(count) * made // count
    return made


def _reordered(vectors: FloatArray, order: IntArray, directory: Path | None) -> FloatArray:
    if directory is None:
        return np.ascontiguousarray(vectors[order], dtype=np.float32)
    path = directory / "vectors.npy"
    with array_writer(path, np.float32, vectors.shape, WrittenFile()) as append:
        for first in range(0, len(order), _CHUNK):
            append(vectors[order[first : first + _CHUNK]])
    return np.asarray(map_array([path]))


def _moments(
    vectors: FloatArray, start: IntArray, root: NDArray[np.float64], outlier_cells: int
) -> tuple[FloatArray, NDArray[np.float64], NDArray[np.float64]]:
    """Mean and tr(M S_c) of each cell, and the covariance pooled over ordinary cells."""
    cells, dim = len(start) - 1, vectors.shape[1]
    mean = np.empty((cells, dim), dtype=np.float32)
    variance = np.empty(cells)
    pooled = np.zeros((dim, dim))
    first = 0
    while first < cells:
        last = max(first + 1, int(np.searchsorted(start, start[first] + _CHUNK, "right")) - 1)
        block = vectors[start[first] : start[last]].astype(np.float64)
        bounds, size = start[first:last] - start[first], np.diff(start[first : last + 1])
        center = np.add.reduceat(block, bounds, axis=0) / size[:, None]
        block -= np.repeat(center, size, axis=0)
        ordinary = block[: max(0, start[cells - outlier_cells] - start[first])]
        pooled += ordinary.T @ ordinary
        variance[first:last] = np.add.reduceat(np.square(block @ root).sum(axis=1), bounds) / size
        mean[first:last] = center
        first = last
    return mean, variance, pooled / start[cells - outlier_cells]


def _symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, basis = np.linalg.eigh(matrix)
    # Floor the eigenvalues: directions that these contexts do not use still count.
    values = np.maximum(values, 1e-6 * max(float(values[-1]), 1e-30))
    root: NDArray[np.float64] = (basis * np.sqrt(values)) @ basis.T
    return root
