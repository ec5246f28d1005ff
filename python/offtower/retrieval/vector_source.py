"""Item vectors as passes over parts of them read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.data.array_files import map_array


@dataclass(frozen=True)
class VectorSource:
    """Vectors in files that other processes open too, or in this one's memory.

    Attributes:
        vectors: (N, D), or the files of their parts.
        scale: (D,) of int8 vectors.
    """

    vectors: NDArray[Any] | tuple[Path, ...]
    scale: NDArray[np.float32] | None = None

    def open(self) -> NDArray[Any]:
        """Return the vectors as they are stored."""
        found = map_array(self.vectors) if isinstance(self.vectors, tuple) else self.vectors
        # As a plain array, whose slices are cheaper than those of a memmap.
        return np.asarray(found)

    def float32(self, rows: range | NDArray[Any]) -> NDArray[np.float32]:
        """Return the (n, D) vectors of consecutive rows, or of any, scaled."""
        where = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        wide = np.ascontiguousarray(self.open()[where], dtype=np.float32)
        return wide if self.scale is None else wide * self.scale
