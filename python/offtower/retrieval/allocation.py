"""Sample sizes of the cells for one context: how many items of each are scored.

A cell's mass Z_c = sum of exp(s_a) over its n_c items is estimated from k_c of them. Its mean logit
<u, m_c> is known exactly, so this is a difference estimator with a fixed slope b_c (Cochran,
Sampling Techniques, 7.3):

    W_c = (n_c / k_c) sum over the sample of g(s_a),     g(s) = exp(s) - b_c (s - <u, m_c>).

The sum of g(s_a) over the whole cell is Z_c for any b_c, so W_c is unbiased. A b_c near the slope
of exp removes most of the variance of narrow cells. g is positive for every s while
b_c = exp(<u, m_c> + t) with t < 1, so W_c is positive.

k_c and b_c depend on the export and the query only, never on the sample, which keeps W_c unbiased.
The logits of a cell are assumed normal with mean <u, m_c> and variance
v_c = t_c u'Su / tr(MS), where t_c is the cell's expected variance and S the pooled covariance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offtower.retrieval.cells import Cells

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LEAST_ROWS = 2
"""Smallest sample of a cell: two items give a variance estimate."""
_TAKE_ALL = 0.5
"""A cell is scored whole where its sample would exceed this share of it."""
_STEEPEST = 0.75
"""Largest t: g stays above (1 - t) b_c."""


@dataclass(frozen=True, eq=False)
class CellModel:
    """Predicted log masses of all C cells for one context."""

    log_mass: FloatArray
    """(C,) predicted log Z_c."""
    mean: FloatArray
    """(C,) mean logit of the cell, exact."""
    log_slope: FloatArray
    """(C,) log b_c; -inf for none."""
    variation: FloatArray
    """(C,) predicted coefficient of variation of g(s_a) inside the cell."""

    def thinned(self, share: FloatArray) -> CellModel:
        """The model where items count with probability `share` (C,), whatever their logits.

        A product with an independent 0 or 1 of mean p has a squared coefficient of variation of
        (1 + v^2) / p - 1.
        """
        some = share > 0.0
        kept = np.where(some, share, 1.0)
        squared = np.where(some, (1.0 + self.variation**2) / kept - 1.0, 0.0)
        with np.errstate(divide="ignore"):
            log_mass = self.log_mass + np.log(share)
        return replace(self, log_mass=log_mass, variation=np.sqrt(squared))


def model_cells(
    cells: Cells, query: NDArray[np.float32], plain: IntArray | None = None
) -> CellModel:
    """Predict mass and variation of each cell from normal logits.

    For n normal logits of deviation sigma, the log of the sum of exp is mean + log n + sigma^2/2 up
    to sigma = sqrt(2 log n), and mean + sigma sqrt(2 log n) beyond, where the maximum dominates
    (random energy model, Derrida 1981).

    Args:
        plain: cells with excluded items. They get no slope: their mean includes those items.
    """
    wide = query.astype(np.float64)
    inside = float(wide @ cells.covariance @ wide)
    scale = inside / cells.pooled_logit_variance if cells.pooled_logit_variance > 0.0 else 0.0
    variance = np.maximum(cells.logit_variance * scale, 0.0)
    mean = (cells.mean @ query).astype(np.float64)
    # b_c = E[exp(s)] = exp(mean + v/2) is the best slope for normal logits.
    rise = np.minimum(0.5 * variance, _STEEPEST)
    share = np.exp(rise - 0.5 * variance)
    if plain is not None and len(plain):
        rise[plain] = -np.inf
        share[plain] = 0.0
    # Var g / E[exp(s)]^2 = exp(v) - 1 - 2 share v + share^2 v.
    narrow = np.minimum(variance, 50.0)
    squared = np.expm1(narrow) - (2.0 - share) * share * narrow
    return CellModel(
        mean + _log_sum_of_normals(variance, cells.size),
        mean,
        mean + rise,
        np.sqrt(np.clip(squared, 0.0, cells.size)),
    )


def _log_sum_of_normals(variance: FloatArray, size: IntArray) -> FloatArray:
    """Log of the sum of exp of n centered normal numbers."""
    log_size = np.log(size)
    return np.where(
        variance < 2.0 * log_size, log_size + 0.5 * variance, np.sqrt(2.0 * variance * log_size)
    )


def allocate(
    mass: FloatArray,
    variation: FloatArray,
    size: IntArray,
    target: float,
    whole: IntArray,
) -> IntArray:
    """Neyman allocation of k_c, for an estimated sum of Z_c with standard deviation `target`.

    Minimizes sum k_c subject to sum (n_c S_c)^2 (1/k_c - 1/n_c) = target^2 and
    LEAST_ROWS <= k_c <= n_c (Neyman 1934; Cochran, Sampling Techniques, 5.5, 5.8).

    Args:
        mass: (C,) predicted Z_c.
        variation: (C,) predicted coefficient of variation of g(s_a) inside the cell.
        size: (C,) n_c.
        target: standard deviation, in the units of `mass`.
        whole: cells that are scored whole already.
    """
    spread = mass * variation
    taken = np.zeros(len(size), dtype=bool)
    taken[whole] = True
    variance = target**2
    rows = size
    for _ in range(6):
        rest = ~taken
        left = spread[rest]
        needed = variance + float(np.sum(left * left / size[rest]))
        if needed <= 0.0:
            return size.copy()
        rate = float(left.sum()) / needed
        rows = np.maximum(np.ceil(rate * spread), LEAST_ROWS)
        more = rest & (rows > _TAKE_ALL * size)
        if not more.any():
            break
        taken |= more
    counts: IntArray = np.where(taken, size, np.minimum(rows, size)).astype(np.int64)
    return counts


def predicted_variance(
    mass: FloatArray, variation: FloatArray, size: IntArray, count: IntArray
) -> FloatArray:
    """(C,) variance of each W_c under the model, from k_c = `count` items."""
    return np.asarray((mass * variation) ** 2 * (1.0 / count - 1.0 / size))
