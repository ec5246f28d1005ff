"""Partition a catalogue into cells.

Each split reduces the expected variance of a logit inside a cell,

    E_u[ u' S_c u ] = tr(M S_c),      M = E[u u'] over the policy's own contexts,

where S_c is the covariance of the item vectors of cell c. This is clustering of M^(1/2) v by
Euclidean distance, by a tree of splits (`retrieval.split_tree`), which takes seconds for a million
items and gives cells of equal size. The items with the largest Mahalanobis-type distance
(v - m_c)' M (v - m_c) then move to separate outlier cells.

Passes over the items are parts of a mapper; this process fits the tree and sorts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.data.array_files import part_rows, write_array
from offtower.mapping import Mapper
from offtower.retrieval.cells import ITEMS, VECTORS, Cells, FloatArray, IntArray
from offtower.retrieval.split_tree import SplitTree, fit_split_tree
from offtower.retrieval.vector_source import VectorSource

_CHUNK = 262_144
_CELLS_PER_OUTLIERS = 256
"""Ordinary cells per outlier cell."""


def default_num_cells(num_items: int) -> int:
    """About 4 sqrt(N), rounded to a power of two, with at least 16 items per cell."""
    wanted = min(4.0 * num_items**0.5, num_items / 16)
    return 1 << round(float(np.log2(max(wanted, 1.0))))


@dataclass(frozen=True)
class _Ordered:
    """Vectors of a source in another order.

    order: (N,) item of each row, or the .npy file with it.
    """

    source: VectorSource
    order: NDArray[Any] | Path

    def __call__(self, rows: range) -> FloatArray:
        order = self.order
        item = np.load(order, mmap_mode="r") if isinstance(order, Path) else order
        return self.source.float32(np.asarray(item[rows.start : rows.stop]))


def build_cells(
    vectors: FloatArray | tuple[Path, ...],
    queries: FloatArray,
    directory: Path | None = None,
    *,
    num_cells: int | None = None,
    seed: int = 0,
    mapper: Mapper | None = None,
) -> Cells:
    """Partition a catalogue into cells.

    Args:
        vectors: (N, D) item vectors, or the files of their parts; read in chunks.
        queries: (n, D) representative context embeddings.
        directory: folder for the vectors, ordered by cell; None keeps them in memory.
        num_cells: C, rounded to a power of two; None derives it from N.
        seed: seed of the split directions and of the order inside cells.
        mapper: assigns, orders and sums parts of the items, with the same bits for any number of
            workers. Where it runs in other processes, vectors are files and there is a directory.
    """
    mapper, source = mapper or Mapper(), VectorSource(vectors)
    whole = source.open()
    n = len(whole)
    depth = round(float(np.log2(num_cells or default_num_cells(n))))
    rng = np.random.default_rng(seed)
    second = (queries.astype(np.float64).T @ queries.astype(np.float64)) / max(1, len(queries))
    root = _symmetric_root(second)
    second = root @ root
    tree = fit_split_tree(whole, root, depth, rng)
    assign = mapper.map(partial(_assign, source, tree), part_rows(n), "assigning items to cells")
    cell = np.concatenate(list(assign))
    outlier_cells = _separate_outliers(
        source, cell, root, mapper, cells=1 << depth, directory=directory
    )
    # Shuffle inside each cell: any run of rows is then a random sample of it.
    number = _number_type(n)
    order = np.arange(n, dtype=number)
    rng.shuffle(order)
    order = order[np.argsort(cell[order], kind="stable")]
    start = _starts(cell)
    del cell
    row_of_item = np.empty(n, dtype=number)
    row_of_item[order] = np.arange(n, dtype=number)
    if directory is None:
        rows = VectorSource(_Ordered(source, order)(range(n)))
    else:
        np.save(directory / ITEMS, order)
        block = _Ordered(source, (directory / ITEMS).resolve())
        written = write_array(directory, VECTORS, np.float32, (n, whole.shape[1]), block, mapper)
        rows = VectorSource(tuple(directory.resolve() / name for name in written))
    mean, logit_variance, covariance = _moments(rows, start, root, outlier_cells, mapper)
    return Cells(
        rows.open(),
        order,
        row_of_item,
        start,
        mean,
        logit_variance,
        covariance,
        float(np.sum(second * covariance)),
        outlier_cells,
    )


def _assign(source: VectorSource, tree: SplitTree, rows: range) -> NDArray[np.int32]:
    """(n,) cell of each item of a part."""
    return tree.route(source.float32(rows)).astype(np.int32)


def _number_type(n: int) -> Any:
    return np.int32 if n < 2**31 else np.int64


def _starts(cell: NDArray[np.int32]) -> IntArray:
    """(C + 1,) first row of each cell that has items."""
    size = np.bincount(cell)
    return np.append(0, np.cumsum(size[size > 0]))


def _separate_outliers(
    source: VectorSource,
    cell: NDArray[np.int32],
    root: NDArray[np.float64],
    mapper: Mapper,
    *,
    cells: int,
    directory: Path | None,
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
    order = np.argsort(cell, kind="stable").astype(_number_type(n))
    start = _starts(cell)
    with _shared(order, directory) as kept:
        work = partial(_distances, _Ordered(source, kept), root)
        far = np.concatenate(list(mapper.map(work, _runs(start), "looking for outliers")))
    last = np.argpartition(-far, count - 1)[:count]
    # Sorted by distance, so that an outlier cell holds items of similar distance.
    last = last[np.argsort(far[last], kind="stable")]
    cell[order[last]] = cells + np.arange(count) * made // count
    return made


@contextmanager
def _shared(order: NDArray[Any], directory: Path | None) -> Iterator[NDArray[Any] | Path]:
    """An order of rows as workers see it: a file, for as long as it is needed."""
    if directory is None:
        yield order
        return
    path = directory.resolve() / "by_cell.npy"
    np.save(path, order)
    yield path
    path.unlink()


@dataclass(frozen=True)
class _Run:
    """Consecutive cells, about _CHUNK rows.

    start: first row of each, and the end.
    """

    start: IntArray

    @property
    def rows(self) -> range:
        return range(int(self.start[0]), int(self.start[-1]))

    def means(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        """(cells, D) means of their rows."""
        size = np.diff(self.start)
        bounds = self.start[:-1] - self.start[0]
        return np.asarray(np.add.reduceat(block, bounds, axis=0) / size[:, None])


def _runs(start: IntArray) -> list[_Run]:
    """Split cells, of which none is empty, into runs that depend on their sizes only."""
    runs, first, cells = [], 0, len(start) - 1
    while first < cells:
        last = max(first + 1, int(np.searchsorted(start, start[first] + _CHUNK, "right")) - 1)
        runs.append(_Run(start[first : last + 1]))
        first = last
    return runs


def _distances(vectors: _Ordered, root: NDArray[np.float64], run: _Run) -> FloatArray:
    """(n,) squared distance of each row from its cell's mean."""
    block = vectors(run.rows).astype(np.float64)
    block -= np.repeat(run.means(block), np.diff(run.start), axis=0)
    return np.asarray(np.square(block @ root).sum(axis=1), dtype=np.float32)


@dataclass(frozen=True)
class _CellSums:
    """Means and logit variances of a run's cells, and the sum of d d' over ordinary ones' rows."""

    mean: FloatArray
    logit_variance: NDArray[np.float64]
    squares: NDArray[np.float64]


def _cell_sums(
    source: VectorSource, root: NDArray[np.float64], ordinary: int, run: _Run
) -> _CellSums:
    """ordinary: number of rows in cells without outliers."""
    rows, size = run.rows, np.diff(run.start)
    block = source.float32(rows).astype(np.float64)
    center = run.means(block)
    block -= np.repeat(center, size, axis=0)
    inside = block[: max(0, ordinary - rows.start)]
    squared = np.square(block @ root).sum(axis=1)
    bounds = run.start[:-1] - run.start[0]
    variance = np.add.reduceat(squared, bounds) / size
    return _CellSums(center.astype(np.float32), variance, inside.T @ inside)


def _moments(
    source: VectorSource,
    start: IntArray,
    root: NDArray[np.float64],
    outlier_cells: int,
    mapper: Mapper,
) -> tuple[FloatArray, NDArray[np.float64], NDArray[np.float64]]:
    """Mean and tr(M S_c) of each cell, and the covariance pooled over ordinary cells."""
    ordinary = int(start[len(start) - 1 - outlier_cells])
    work = partial(_cell_sums, source, root, ordinary)
    found = list(mapper.map(work, _runs(start), "moments of the cells"))
    return (
        np.concatenate([one.mean for one in found]),
        np.concatenate([one.logit_variance for one in found]),
        np.sum([one.squares for one in found], axis=0) / ordinary,
    )


def _symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, basis = np.linalg.eigh(matrix)
    # Floor the eigenvalues: directions that these contexts do not use still count.
    values = np.maximum(values, 1e-6 * max(float(values[-1]), 1e-30))
    root: NDArray[np.float64] = (basis * np.sqrt(values)) @ basis.T
    return root
