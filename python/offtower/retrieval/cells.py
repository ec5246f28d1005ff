"""The catalogue partitioned into cells of items with similar logits, for the propensity sampler.

Rows of a cell are in random order, so any run of consecutive rows is a random sample of the cell.
The last cells hold outliers, which every context scores: one outlier could hold most of a context's
probability mass while a sample of its cell misses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from offtower.data.array_files import map_array, part_names
from offtower.errors import RunError

VECTORS, ITEMS = "vectors", "item.npy"
"""Files of the vectors, ordered by cell, and of the item of each row."""

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cells:
    """Item vectors ordered by cell. D is the query dimension, C the number of cells."""

    vectors: FloatArray
    """(N, D)."""
    item_of_row: NDArray[Any]
    """(N,) item number of each row, int32 or int64."""
    row_of_item: NDArray[Any]
    """(N,) row of each item, of the same dtype."""
    start: IntArray
    """(C + 1,) first row of each cell; no cell is empty."""
    mean: FloatArray
    """(C, D) mean vector of each cell."""
    logit_variance: NDArray[np.float64]
    """(C,) tr(M S_c), the expected variance of a logit inside the cell; see `partitioning`."""
    covariance: NDArray[np.float64]
    """(D, D) within-cell covariance S, pooled over cells without outliers."""
    pooled_logit_variance: float
    """tr(M S)."""
    outlier_cells: int
    """Number of trailing cells that hold outliers."""

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

    def statistics(self) -> dict[str, Any]:
        """Summary for the manifest."""
        size = self.size
        return {
            "cells": self.num_cells,
            "outliers": int(size[self.num_cells - self.outlier_cells :].sum()),
            "smallest": int(size.min()),
            "largest": int(size.max()),
            "logit_variance_inside": float(np.average(self.logit_variance, weights=size)),
        }

    def save(self, directory: Path) -> None:
        """Write all but the vectors and their items, which `partitioning.build_cells` writes."""
        np.save(directory / "place.npy", self.row_of_item)
        np.save(directory / "start.npy", self.start)
        np.savez(
            directory / "moments.npz",
            mean=self.mean,
            spread=self.logit_variance,
            covariance=self.covariance,
            mean_spread=np.float64(self.pooled_logit_variance),
            always=np.int64(self.outlier_cells),
        )

    @classmethod
    def load(cls, directory: Path) -> Cells:
        """Open saved cells, large arrays memory-mapped and read-only.

        Raises:
            RunError: a file is missing or damaged, or shapes are inconsistent.
        """
        try:
            item, row, start = (
                np.load(directory / name, mmap_mode="r", allow_pickle=False)
                for name in (ITEMS, "place.npy", "start.npy")
            )
            # Exports of earlier versions have one file whatever the number of items.
            one = (directory / f"{VECTORS}.npy").exists()
            names = [f"{VECTORS}.npy"] if one else part_names(VECTORS, len(item))
            vectors = map_array([directory / name for name in names])
            with np.load(directory / "moments.npz", allow_pickle=False) as moments:
                cells = cls(
                    np.asarray(vectors),
                    np.asarray(item),
                    np.asarray(row),
                    np.asarray(start),
                    mean=moments["mean"],
                    logit_variance=moments["spread"],
                    covariance=moments["covariance"],
                    pooled_logit_variance=float(moments["mean_spread"]),
                    outlier_cells=int(moments["always"]),
                )
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise RunError(f"the cells at '{directory}' cannot be read: {error}") from error
        n, dim = cells.vectors.shape
        if (
            (item.shape, row.shape) != ((n,), (n,))
            or int(start[-1]) != n
            or cells.mean.shape != (cells.num_cells, dim)
        ):
            raise RunError(f"the files of the cells at '{directory}' do not belong together")
        return cells
