"""Draws from the softmax policy over all N items, with propensities, in a small part of a scan.

Three ways, for one context u with logits s_a and Z = sum_a exp s_a:

- **exact** scores every item. pscore = exp(s_a) / Z.
- **softmax** (default) scores the cells that hold most of the mass, the outliers, and a random run
  of items in every other cell. From the run comes an unbiased, positive estimate W_c of the cell's
  mass Z_c (`retrieval.design`; exact where all of the cell was scored), and Z^ = sum_c W_c of Z. A
  cell is drawn with probability W_c / Z^, then an item of the whole cell by its exact softmax.
  pscore = exp(s_a) / Z^.
- **cells** draws a cell by weights that the export alone determines, then an item of that cell by
  its exact softmax: another policy than the softmax, but one whose probabilities are known exactly.

What holds for `softmax` whatever the index, the budget or the model behind it:

1. E[ 1{A = a} / pscore ] = E[W_c] / Z_c = 1 for every item a. That is all that inverse propensity
   weighting asks for: IPS on the log is unbiased, not merely up to the error of pscore.
2. Given the run of items, the item was drawn with probability exactly W_c / Z^ exp(s_a) / Z_c,
   `conditional_pscore`, which is positive for every item. Using that one is right too; it has more
   variance.
3. pscore is the softmax's own probability but for the error of Z^, whose standard error is
   reported with it (`relative_error`).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offtower.errors import ConfigError, DataError
from offtower.retrieval.cells import Cells
from offtower.retrieval.drawing import Draws, independent, slate
from offtower.retrieval.weights import (
    Weights,
    estimated_weights,
    exact_weights,
    weights_by_model,
)

Mode = Literal["softmax", "cells", "exact"]
IntArray = NDArray[np.int64]

_FEW = 20
"""Filters that leave less than one item in so many are answered from those items alone."""

__all__ = ["Draws", "Mode", "PropensitySampler"]


class PropensitySampler:
    """Draws items for one context at a time.

    Args:
        cells: the catalogue.
        relative_error: standard error of pscore that `softmax` aims at, as a share of pscore.

    Raises:
        ConfigError: relative_error is not in (0, 1).
    """

    def __init__(self, cells: Cells, *, relative_error: float = 0.002) -> None:
        if not 0.0 < relative_error < 1.0:
            raise ConfigError(f"relative_error must lie in (0, 1), got {relative_error}")
        self.cells = cells
        self.relative_error = relative_error

    def draw(
        self,
        query: NDArray[np.float32],
        rng: np.random.Generator,
        *,
        size: int = 1,
        mode: Mode = "softmax",
        exclude: IntArray | None = None,
    ) -> Draws:
        """Independent draws (with replacement) for one context.

        Args:
            query: (D,) context embedding, temperature and bias folded in.
            rng: source of the randomness.
            size: n draws; they share the items that were looked at.
            mode: see the module.
            exclude: numbers of items that must not be shown; the others' propensities are
                renormalised.

        Raises:
            DataError: a query is not finite, or no item is left.
        """
        return independent(self.weights(query, rng, mode, exclude), rng, size)

    def slate(
        self,
        query: NDArray[np.float32],
        rng: np.random.Generator,
        *,
        size: int,
        mode: Mode = "softmax",
        exclude: IntArray | None = None,
    ) -> Draws:
        """A slate without replacement (Plackett-Luce): n positions from the top.

        The propensity of a position is conditional on the items above it. In mode `softmax` the
        product of a slate's propensities p_1 ... p_n again satisfies E[1{slate} / product] = 1.

        Args:
            size: n positions; others as in `draw`.

        Raises:
            DataError: fewer than n items may be shown, or a query is not finite.
        """
        return slate(self.weights(query, rng, mode, exclude, positions=size), rng, size)

    def weights(
        self,
        query: NDArray[np.float32],
        rng: np.random.Generator,
        mode: Mode = "softmax",
        exclude: IntArray | None = None,
        positions: int = 1,
    ) -> Weights:
        """What draws are made from; see `draw` and `slate`."""
        cells = self.cells
        if mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got '{mode}'")
        query = np.ascontiguousarray(query, dtype=np.float32)
        if query.shape != (cells.vectors.shape[1],) or not np.isfinite(query).all():
            raise DataError(
                f"a context embedding must be {cells.vectors.shape[1]} finite numbers, got "
                f"shape {query.shape}"
            )
        if positions < 1:
            raise ConfigError(f"the number of positions must be at least 1, got {positions}")
        hidden = self._rows_hidden(exclude)
        left = len(cells.item) - len(hidden)
        if left < positions:
            raise DataError(
                f"{positions} items were asked for, but filters leave {left} of {len(cells.item):,}"
            )
        if mode == "cells":
            return weights_by_model(cells, query, hidden)
        if mode == "exact" or left * _FEW < len(cells.item):
            return exact_weights(cells, query, hidden)
        return estimated_weights(
            cells,
            query,
            rng,
            hidden,
            positions=positions,
            relative_error=self.relative_error,
        )

    def _rows_hidden(self, exclude: IntArray | None) -> IntArray:
        """Rows of excluded items, sorted, each once."""
        if exclude is None or len(exclude) == 0:
            return np.zeros(0, dtype=np.int64)
        exclude = np.asarray(exclude, dtype=np.int64)
        if exclude.min() < 0 or exclude.max() >= len(self.cells.item):
            raise DataError(
                f"item numbers to exclude must lie in [0, {len(self.cells.item) - 1}], got "
                f"{int(exclude.min())} to {int(exclude.max())}"
            )
        return np.unique(self.cells.place[exclude])
