"""The catalogue cut into cells of items with alike logits: what propensities are made with.

The cells minimise, split by split, the expected variance of a logit inside a cell,

    E_u[ u' S_c u ] = tr(M S_c),      M = E[u u'] over the policy's own contexts,

S_c being the covariance of the item vectors of cell c. That is clustering of M^(1/2) v by plain
distance; a tree of median splits along principal directions does it in seconds for a million
items, and its cells have equal sizes. Inside a cell the rows lie in random order, so that any run
of them is a random sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.errors import RunError

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

FILES = ("vectors.npy", "item.npy", "place.npy", "start.npy", "moments.npz")

_SPLIT_ROWS = 2_000_000
"""Items that splits are chosen from; a larger catalogue is sampled."""
_DIRECTION_ROWS = 4_000
"""Items that a split's direction is taken from."""
_CHUNK = 262_144


@dataclass(frozen=True, eq=False)
class Cells:
    """Item vectors in the order of their cells. D is the augmented dimension, C the cells."""

    vectors: FloatArray
    """(N, D)."""
    item: IntArray
    """(N,) item number of each row."""
    place: IntArray
    """(N,) row of each item."""
    start: IntArray
    """(C + 1,) first row of each cell; no cell is empty."""
    mean: FloatArray
    """(C, D) mean vector of each cell."""
    spread: NDArray[np.float64]
    """(C,) tr(M S_c): expected variance of a logit inside the cell."""
    covariance: NDArray[np.float64]
    """(D, D) pooled covariance inside cells."""
    mean_spread: float
    """tr(M S) of the pooled covariance."""

    @property
    def num_cells(self) -> int:
        return len(self.start) - 1

    @property
    def size(self) -> IntArray:
        """(C,) items of each cell."""
        return np.diff(self.start)

    def cell_of(self, row: IntArray) -> IntArray:
        """(n,) cells of rows."""
        return np.searchsorted(self.start, row, side="right") - 1

    def save(self, directory: Path) -> None:
        """Write the small parts; `build_cells` has written vectors.npy already."""
        np.save(directory / "item.npy", self.item)
        np.save(directory / "place.npy", self.place)
        np.save(directory / "start.npy", self.start)
        np.savez(
            directory / "moments.npz",
            mean=self.mean,
            spread=self.spread,
            covariance=self.covariance,
            mean_spread=np.float64(self.mean_spread),
        )

    @classmethod
    def load(cls, directory: Path) -> Cells:
        """Memory-mapped, read-only.

        Raises:
            RunError: a file is missing or damaged, or the shapes do not fit together.
        """
        try:
            arrays = {
                name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("vectors", "item", "place", "start")
            }
            with np.load(directory / "moments.npz", allow_pickle=False) as moments:
                parts = {name: moments[name] for name in ("mean", "spread", "covariance")}
                mean_spread = float(moments["mean_spread"])
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"the cells at '{directory}' cannot be read: {error}") from error
        vectors = np.asarray(arrays["vectors"])
        n, dim = vectors.shape
        start = np.asarray(arrays["start"])
        shapes = [arrays["item"].shape == (n,), arrays["place"].shape == (n,)]
        shapes += [int(start[-1]) == n, parts["mean"].shape == (len(start) - 1, dim)]
        if not all(shapes):
            raise RunError(f"the files of the cells at '{directory}' do not belong together")
        return cls(
            vectors,
            np.asarray(arrays["item"]),
            np.asarray(arrays["place"]),
            start,
            mean_spread=mean_spread,
            **parts,
        )


def default_num_cells(num_items: int) -> int:
    """About 4 sqrt(N), a power of two, of at least 16 items each."""
    wanted = min(4.0 * num_items**0.5, num_items / 16)
    return max(1, 2 ** round(float(np.log2(max(wanted, 1.0)))))


def build_cells(
    vectors: FloatArray,
    queries: FloatArray,
    directory: Path | None = None,
    *,
    num_cells: int | None = None,
    seed: int = 0,
) -> Cells:
    """Cut a catalogue into cells.

    Args:
        vectors: (N, D) item vectors, memory-mapped where they are many; read in chunks.
        queries: (n, D) context embeddings that the policy will see.
        directory: where vectors.npy in the cells' order is written; in memory without one.
        num_cells: C, rounded to a power of two.
        seed: of directions and of the order inside cells.
    """
    n = len(vectors)
    depth = round(float(np.log2(num_cells or default_num_cells(n))))
    rng = np.random.default_rng(seed)
    second = (queries.astype(np.float64).T @ queries.astype(np.float64)) / max(1, len(queries))
    root = _symmetric_root(second)
    second = root @ root
    rows = slice(None)
    if n > _SPLIT_ROWS:
        rows = np.sort(rng.choice(n, _SPLIT_ROWS, replace=False))  # type: ignore[assignment]
    direction, threshold = _split_tree((vectors[rows] @ root).astype(np.float32), depth, rng)
    # Directions are of M^(1/2) v; with the root folded in they take v itself.
    direction = (direction @ root).astype(np.float32)
    cell = np.empty(n, dtype=np.int64)
    for first in range(0, n, _CHUNK):
        cell[first : first + _CHUNK] = _route(
            np.asarray(vectors[first : first + _CHUNK]), direction, threshold, depth
        )
    # A random key inside each cell: any run of rows is a random sample of its cell.
    order = np.lexsort((rng.permutation(n), cell))
    start = np.unique(cell[order], return_index=True)[1]
    start = np.append(start, n).astype(np.int64)
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    arranged = _arranged(vectors, order, directory)
    mean, spread, covariance = _moments(arranged, start, root)
    return Cells(
        arranged,
        order.astype(np.int64),
        place,
        start,
        mean,
        spread,
        covariance,
        float(np.sum(second * covariance)),
    )


def facts(cells: Cells) -> dict[str, Any]:
    """What the manifest says of the cells."""
    size = cells.size
    return {
        "cells": cells.num_cells,
        "smallest": int(size.min()),
        "largest": int(size.max()),
        "logit_variance_inside": float(np.average(cells.spread, weights=size)),
    }


def _split_tree(
    points: FloatArray, depth: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Directions (2^depth - 1, D) and thresholds of a binary tree of median splits, by level."""
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
    """A few power iterations: a direction of large variance is all that a split needs."""
    some = points[:_DIRECTION_ROWS]
    centred = some - some.mean(axis=0)
    scatter = centred.T @ centred
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


def _arranged(vectors: FloatArray, order: IntArray, directory: Path | None) -> FloatArray:
    if directory is None:
        return np.ascontiguousarray(vectors[order], dtype=np.float32)
    target: Any = np.lib.format.open_memmap(
        directory / "vectors.npy", mode="w+", dtype=np.float32, shape=vectors.shape
    )
    for first in range(0, len(order), _CHUNK):
        target[first : first + _CHUNK] = vectors[order[first : first + _CHUNK]]
    target.flush()
    return np.asarray(target)


def _moments(
    vectors: FloatArray, start: IntArray, root: NDArray[np.float64]
) -> tuple[FloatArray, NDArray[np.float64], NDArray[np.float64]]:
    """Mean and tr(M S_c) of each cell, pooled covariance; a group of cells at a time."""
    cells, dim = len(start) - 1, vectors.shape[1]
    mean = np.empty((cells, dim), dtype=np.float32)
    spread = np.empty(cells)
    pooled = np.zeros((dim, dim))
    first = 0
    while first < cells:
        last = max(first + 1, int(np.searchsorted(start, start[first] + _CHUNK, "right")) - 1)
        block = vectors[start[first] : start[last]].astype(np.float64)
        bounds, size = start[first:last] - start[first], np.diff(start[first : last + 1])
        centre = np.add.reduceat(block, bounds, axis=0) / size[:, None]
        block -= np.repeat(centre, size, axis=0)
        pooled += block.T @ block
        spread[first:last] = np.add.reduceat(np.square(block @ root).sum(axis=1), bounds) / size
        mean[first:last] = centre
        first = last
    return mean, spread, pooled / start[-1]


def _symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, basis = np.linalg.eigh(matrix)
    # A little of the identity: directions that these contexts never used still count.
    values = np.maximum(values, 1e-6 * max(float(values[-1]), 1e-30))
    root: NDArray[np.float64] = (basis * np.sqrt(values)) @ basis.T
    return root
