"""Draws from the softmax policy over all N items with known propensities, without a full scan.

Three modes, for one context u with logits s_a and Z = sum_a exp s_a:

- **exact** scores every item. pscore = exp(s_a) / Z.
- **softmax** (default) scores the cells of largest mass and the outliers whole, and a random sample
  of every other cell. The sample gives an unbiased, positive estimate W_c of the cell's mass Z_c
  (`retrieval.allocation`; exact for cells scored whole) and Z^ = sum_c W_c of Z. A cell is drawn
  with probability W_c / Z^, then an item of the whole cell by its exact softmax.
  pscore = exp(s_a) / Z^.
- **cells** draws a cell by weights that depend on the export only, then an item of that cell by its
  exact softmax. This differs from the softmax policy, but its probabilities are exact.

Mode `softmax` has these properties for any index and budget:

1. E[ 1{A = a} / pscore ] = E[W_c] / Z_c = 1 for every item a. Inverse propensity weighting needs
   nothing else: IPS on the log is unbiased.
2. Given the sampled rows, the item was drawn with probability exactly W_c / Z^ exp(s_a) / Z_c
   (`conditional_pscore`), which is positive for every item. It is a valid propensity too, with more
   variance.
3. pscore is the softmax probability up to the error of Z^; its standard error is `relative_error`.

`serving` scales the logits by its temperature in every mode. A uniform share eps mixes draws that
are uniform over the items with these, and pscore is the probability of the mixture; in mode
`softmax` property 1 then holds up to the square of `relative_error`. `top` and limits on new items
need every item's logit, so that mode `softmax` is then as `exact`, and mode `cells` is refused.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offtower.config import ServingConfig
from offtower.errors import ConfigError, DataError, NoEligibleItemsError
from offtower.retrieval.cell_sampling import ItemSample, sample_slate, sample_with_replacement
from offtower.retrieval.cell_weights import (
    CellWeights,
    estimated_weights,
    exact_weights,
    model_weights,
)
from offtower.retrieval.cells import Cells
from offtower.retrieval.mixture_sampling import mixed_draws, mixed_slate, served_weights
from offtower.retrieval.row_filter import RowBits, RowFilter, listed_cells

Mode = Literal["softmax", "cells", "exact"]
IntArray = NDArray[np.int64]

FEW = 20
"""Where filters leave fewer than one item in 20, those are scored exactly."""


class PropensitySampler:
    """Draw items for one context at a time.

    Args:
        cells: the partitioned catalogue.
        relative_error: target standard error of pscore in mode `softmax`, as a share of pscore.
        serving: temperature, uniform share and limits of the draws; None draws from the softmax.
        new: (N,) the new items, where `serving.new_items` limits their share.

    Raises:
        ConfigError: relative_error is not in (0, 1), or serving.mode is top_k, which draws nothing.
    """

    def __init__(
        self,
        cells: Cells,
        *,
        relative_error: float = 0.002,
        serving: ServingConfig | None = None,
        new: NDArray[np.bool_] | None = None,
    ) -> None:
        if not 0.0 < relative_error < 1.0:
            raise ConfigError(f"relative_error must lie in (0, 1), got {relative_error}")
        self.cells = cells
        self.relative_error = relative_error
        self.serving = serving or ServingConfig()
        self._new = new
        if self.serving.mode == "top_k":
            raise ConfigError("serving.mode top_k draws nothing: search for the k best items")

    def draw(
        self,
        query: NDArray[np.float32],
        rng: np.random.Generator,
        *,
        size: int = 1,
        mode: Mode = "softmax",
        exclude: IntArray | None = None,
        among: RowBits | IntArray | None = None,
    ) -> ItemSample:
        """Draw with replacement for one context.

        Args:
            query: (D,) context embedding, with temperature and bias folded in.
            size: n draws; they share the sampled rows.
            mode: see the module.
            exclude: item numbers that must not be drawn; propensities are renormalized.
            among: the only items that may be drawn: bits of a group of contexts, or a list of item
                numbers, which alone are then scored.

        Raises:
            ConfigError: unknown mode.
            NoEligibleItemsError: no item is left.
            DataError: the query is not finite.
        """
        weights = self.weights(query, rng, mode, exclude, among=among)
        if self.serving.uniform > 0.0 and weights.all_logits is None:
            return mixed_draws(weights, rng, size, self.serving.uniform)
        return sample_with_replacement(weights, rng, size)

    def slate(
        self,
        query: NDArray[np.float32],
        rng: np.random.Generator,
        *,
        size: int,
        mode: Mode = "softmax",
        exclude: IntArray | None = None,
        among: RowBits | IntArray | None = None,
    ) -> ItemSample:
        """Draw a slate without replacement (Plackett-Luce), top position first.

        The propensity of a position is conditional on the items above it. In mode `softmax` the
        product of a slate's propensities p_1 ... p_n satisfies E[1{slate} / product] = 1.

        Args:
            size: n positions; all items that are left where these are fewer. Other arguments as in
                `draw`.

        Raises:
            ConfigError: unknown mode, or size is below 1.
            NoEligibleItemsError: no item is left.
            DataError: serving.top leaves fewer than n items, or the query is not finite.
        """
        weights = self.weights(query, rng, mode, exclude, positions=size, among=among)
        size = min(size, weights.filter.left)
        if self.serving.uniform > 0.0 and weights.all_logits is None:
            found = mixed_slate(weights, rng, size, self.serving.uniform)
            if found is not None:
                return found
            weights = self.weights(query, rng, "exact", exclude, positions=size, among=among)
        return sample_slate(weights, rng, size)

    def weights(
        self,
        query: NDArray[np.float32],
        rng: np.random.Generator,
        mode: Mode = "softmax",
        exclude: IntArray | None = None,
        positions: int = 1,
        among: RowBits | IntArray | None = None,
    ) -> CellWeights:
        """Cell weights that `draw` and `slate` sample from.

        Weights with the logits of all items are those of the served policy; others lack its uniform
        share, which the draws add.

        Raises:
            ConfigError, NoEligibleItemsError, DataError: as for `slate`.
        """
        cells = self.cells
        if mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got '{mode}'")
        query = np.ascontiguousarray(query, dtype=np.float32)
        if query.shape != (cells.vectors.shape[1],) or not np.isfinite(query).all():
            raise DataError(
                f"a context embedding must be {cells.vectors.shape[1]} finite numbers, got "
                f"shape {query.shape}"
            )
        all_scored = self.serving.top is not None or self.serving.new_items is not None
        if mode == "cells" and all_scored:
            raise ConfigError(
                "mode cells scores only the items of the drawn cells, and serving.top and "
                "serving.new_items need the scores of all: choose mode softmax or exact"
            )
        if positions < 1:
            raise ConfigError(f"the number of positions must be at least 1, got {positions}")
        num_items = len(cells.item_of_row)
        excluded = self._rows_of(exclude)
        if among is None or isinstance(among, RowBits):
            allowed = RowFilter(cells, excluded, among)
        else:
            cells = listed_cells(cells, np.setdiff1d(self._rows_of(among), excluded, True))
            allowed = RowFilter(cells, excluded[:0])
        left, top = allowed.left, self.serving.top
        if left == 0:
            raise NoEligibleItemsError(
                f"filters leave 0 of {num_items:,} items; leave this context out"
            )
        if top is not None and self.serving.uniform == 0.0 and top < min(positions, left):
            raise DataError(
                f"{positions} items were asked for, but serving.top leaves {top}; ask for fewer, "
                "or raise serving.top"
            )
        query = query / np.float32(self.serving.temperature)
        if cells is not self.cells:
            return served_weights(exact_weights(cells, query, allowed), self.serving, self._new)
        if mode == "cells":
            return model_weights(cells, query, allowed)
        if mode == "exact" or all_scored or left * FEW < num_items:
            return served_weights(exact_weights(cells, query, allowed), self.serving, self._new)
        weights = estimated_weights(
            cells,
            query,
            rng,
            allowed,
            positions=positions,
            relative_error=self.relative_error,
        )
        return served_weights(weights, self.serving)

    def _rows_of(self, items: IntArray | None) -> IntArray:
        """Sorted, distinct rows of listed items."""
        if items is None or len(items) == 0:
            return np.zeros(0, dtype=np.int64)
        items = np.asarray(items, dtype=np.int64)
        if items.min() < 0 or items.max() >= len(self.cells.item_of_row):
            raise DataError(
                "item numbers to exclude, or to draw among, must lie in "
                f"[0, {len(self.cells.item_of_row) - 1}], got {int(items.min())} to "
                f"{int(items.max())}"
            )
        return np.unique(self.cells.row_of_item[items])
