"""The catalogue cut into cells of items with alike logits: what propensities are made with.

Inside a cell the rows lie in random order, so that any run of them is a random sample. The last
cells hold outliers, items far from all others, which every context scores: any of them could hold
most of a context's mass while a sample of its cell shows nothing.
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


@dataclass(frozen=True, eq=False)
class Cells:
    """Item vectors in the order of their cells. D is the augmented dimension, C the cells."""

    vectors: FloatArray
    """(N, D)."""
    item: NDArray[Any]
    """(N,) item number of each row, int32 where that suffices."""
    place: NDArray[Any]
    """(N,) row of each item, of the same type."""
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
    always: int
    """How many of the last cells hold outliers."""

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
        """Write the small parts; building the cells has written vectors.npy already."""
        np.save(directory / "item.npy", self.item)
        np.save(directory / "place.npy", self.place)
        np.save(directory / "start.npy", self.start)
        np.savez(
            directory / "moments.npz",
            mean=self.mean,
            spread=self.spread,
            covariance=self.covariance,
            mean_spread=np.float64(self.mean_spread),
            always=np.int64(self.always),
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
                mean_spread, always = float(moments["mean_spread"]), int(moments["always"])
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
            always=always,
            **parts,
        )


def facts(cells: Cells) -> dict[str, Any]:
    """What the manifest says of the cells."""
    size = cells.size
    return {
        "cells": cells.num_cells,
        "outliers": int(size[cells.num_cells - cells.always :].sum()),
        "smallest": int(size.min()),
        "largest": int(size.max()),
        "logit_variance_inside": float(np.average(cells.spread, weights=size)),
    }
