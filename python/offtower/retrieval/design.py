"""How many items of each cell one context's draw looks at.

A cell's mass Z_c = sum of exp(s_a) over its items is estimated from k_c of its n_c items. The mean
m_c of a cell's vectors is known, so the mean logit <u, m_c> of the cell is too, and the estimate is
a difference estimate with it (Cochran, Sampling Techniques, 7.3, with a slope fixed beforehand):

    W_c = (n_c / k_c) sum over the run of g(s_a),     g(s) = exp(s) - b_c (s - <u, m_c>).

sum_a g(s_a) over the whole cell is Z_c whatever b_c is, so W_c is unbiased; with b_c near the slope
of exp, most of the variance of narrow cells is gone. g is positive for every s while
b_c = exp(<u, m_c> + t) with t < 1, so that W_c is.

k_c and b_c are chosen from what the export knows of the cells and from nothing that is random, so
that every estimate stays unbiased. The logits of a cell are modelled as normal: mean <u, m_c>,
variance v_c = t_c u'Su / tr(MS), with t_c the cell's expected variance and S the pooled covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.retrieval.cells import Cells

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LEAST_ROWS = 2
"""Items looked at in every cell: one gives every item a chance, two give a variance."""
_TAKE_ALL = 0.5
"""A cell is taken whole where more than this share of it would be looked at."""
_STEEPEST = 0.75
"""Largest t: g stays above (1 - t) b_c."""


@dataclass(frozen=True, eq=False)
class CellModel:
    """Predicted masses of all C cells for one context, in logarithms."""

    log_mass: FloatArray
    """(C,) predicted log Z_c."""
    mean: FloatArray
    """(C,) mean logit of the cell, exact."""
    log_slope: FloatArray
    """(C,) log b_c; -inf for none."""
    variation: FloatArray
    """(C,) predicted coefficient of variation of g(s_a) inside the cell."""


def model_cells(
    cells: Cells, query: NDArray[np.float32], plain: IntArray | None = None
) -> CellModel:
    """Normal logits inside a cell, frozen at their expected maximum where they are wide.

    With n normal logits of deviation sigma, the log of the sum is mean + log n + sigma^2/2 up to
    sigma = sqrt(2 log n), and mean + sigma sqrt(2 log n) beyond, where the largest one alone counts
    (the random energy model, Derrida 1981).

    Args:
        plain: cells without a slope: where items must not be shown, the mean is not that of the
            others.
    """
    wide = query.astype(np.float64)
    inside = float(wide @ cells.covariance @ wide)
    scale = inside / cells.mean_spread if cells.mean_spread > 0.0 else 0.0
    variance = np.maximum(cells.spread * scale, 0.0)
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
    """log of the sum of exp of n centred normal numbers."""
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
    """k_c by Neyman's allocation, for a sum of Z_c with standard deviation `target`.

    Minimises sum k_c subject to sum (n_c S_c)^2 (1/k_c - 1/n_c) = target^2 and
    LEAST_ROWS <= k_c <= n_c (Neyman 1934; Cochran, Sampling Techniques, 5.5, 5.8).

    Args:
        mass: (C,) predicted Z_c.
        variation: (C,) predicted S_c / mean of the cell's g(s_a).
        size: (C,) n_c.
        target: standard deviation, in the units of `mass`.
        whole: cells that are taken whole already.
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
    # A cell without a predicted spread still needs its least rows, and no more.
    counts: IntArray = np.where(taken, size, np.minimum(rows, size)).astype(np.int64)
    return counts


def predicted_variance(
    mass: FloatArray, variation: FloatArray, size: IntArray, look: IntArray
) -> float:
    """Variance of the estimated sum of Z_c that the model of the cells expects."""
    return float(np.sum((mass * variation) ** 2 * (1.0 / look - 1.0 / size)))
