"""Weights W_c of the cells for one context: exact, estimated, or by the cells' model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.retrieval.cells import Cells
from offtower.retrieval.design import CellModel, allocate, model_cells, predicted_variance
from offtower.retrieval.scoring import contains, ranges, runs, score_rows

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TINY = 1e-200
"""What is left of a sum of weights below this is rounding."""
_HEAD_CELLS = 32
"""Cells scored first and whole: what they hold decides how well the rest must be known."""
_PEAKED_CELLS = 128
"""As many where the first ones hold more than _PEAKED_SHARE of the mass: single items decide then,
of which a model of the cells' masses knows less."""
_PEAKED_SHARE = 0.5
_ROUNDING = 2.0**-22
_SCAN_SHARE = 0.4
"""Where more of the catalogue would be looked at, all of it is."""


@dataclass(eq=False)
class Weights:
    """One context's cells. Everything is relative to exp(shift)."""

    cells: Cells
    query: NDArray[np.float32]
    hidden: IntArray
    """Rows that must not be shown, sorted."""
    weight: FloatArray
    """(C,) W_c."""
    variance: FloatArray
    """(C,) estimated variance of W_c; 0 where it is exact."""
    shift: float
    rows_scored: int
    """Items whose logit was computed."""
    by_softmax: bool = True
    """Whether W_c estimates the softmax's mass, or is a law of its own."""
    expected_variance: float = 0.0
    """Variance of sum W_c that the model of the cells expects: a run that missed its cell's few
    large items knows too little of its own variance, so the larger of the two is reported."""
    rounding: float = 0.0
    """Relative error of pscore that float32 logits of this size leave, beside that of sum W_c."""
    all_logits: FloatArray | None = None
    """(N,) by row, where every item was scored."""

    def relative_error(self, variance: FloatArray, total: FloatArray) -> FloatArray:
        """Standard errors of pscore, as shares of it, where `total` is left of sum W_c."""
        known = np.maximum(variance, self.expected_variance)
        return np.asarray(np.hypot(np.sqrt(known) / total, self.rounding))

    def logits(self, cell: IntArray) -> tuple[IntArray, FloatArray, IntArray]:
        """Items of some whole cells, one cell after the other.

        Returns:
            rows (n,), their logits (n,), -inf where an item must not be shown, and the first place
            of each cell among them.
        """
        size = self.cells.start[cell + 1] - self.cells.start[cell]
        rows = ranges(self.cells.start[cell], size)
        if self.all_logits is not None:
            logit = self.all_logits[rows]
        else:
            logit = score_rows(self.cells.vectors, self.query, rows)
            self.rows_scored += len(rows)
            logit[contains(self.hidden, rows)] = -np.inf
        return rows, logit, np.cumsum(size) - size


def weights_by_model(cells: Cells, query: NDArray[np.float32], hidden: IntArray) -> Weights:
    """Weights that the export alone determines: no item is scored."""
    log_mass = model_cells(cells, query).log_mass
    if len(hidden):
        gone = np.bincount(cells.cell_of(hidden), minlength=cells.num_cells)
        with np.errstate(divide="ignore"):
            log_mass = log_mass + np.log1p(-gone / cells.size)
    shift = float(log_mass.max())
    weight = np.exp(log_mass - shift)
    # No cell is ruled out by rounding: an item of any of them may be a better policy's choice.
    weight[(weight < TINY) & np.isfinite(log_mass)] = TINY
    return Weights(cells, query, hidden, weight, np.zeros(len(weight)), shift, 0, by_softmax=False)


def exact_weights(cells: Cells, query: NDArray[np.float32], hidden: IntArray) -> Weights:
    """Every item scored."""
    logit = (cells.vectors @ query).astype(np.float64)
    logit[hidden] = -np.inf
    shift = float(logit.max())
    weight = np.add.reduceat(np.exp(logit - shift), cells.start[:-1])
    nothing = np.zeros(len(weight))
    return Weights(cells, query, hidden, weight, nothing, shift, len(logit), all_logits=logit)


def estimated_weights(
    cells: Cells,
    query: NDArray[np.float32],
    rng: np.random.Generator,
    hidden: IntArray,
    *,
    positions: int,
    relative_error: float,
) -> Weights:
    """Look at the cells that count, and at a random run of the others.

    Args:
        positions: of the slate that is to be drawn.
        relative_error: standard error of sum W_c that is aimed at, as a share of it.
    """
    size = cells.size
    model = model_cells(cells, query, np.unique(cells.cell_of(hidden)) if len(hidden) else None)
    rest = np.ones(cells.num_cells, dtype=bool)
    head: list[IntArray] = []
    found: list[FloatArray] = []
    for more in _heads(cells, model):
        rest[more] = False
        rows = ranges(cells.start[more], size[more])
        logit = score_rows(cells.vectors, query, rows)
        logit[contains(hidden, rows)] = -np.inf
        head.append(more)
        found.append(logit)
        shift = max(
            *(float(part.max(initial=-np.inf)) for part in found),
            float(model.log_mass[rest].max(initial=-np.inf)),
        )
        if not np.isfinite(shift):
            return exact_weights(cells, query, hidden)
        mass = np.where(rest, np.exp(np.minimum(model.log_mass - shift, 0.0)), 0.0)
        shown = np.exp(np.concatenate(found) - shift)
        inside = float(shown.sum())
        if inside < _PEAKED_SHARE * (inside + float(mass.sum())):
            break
    whole, logit = np.concatenate(head), np.concatenate(found)
    # Of a slate the last position must be known as well as the first: what is left when the
    # largest have been drawn.
    if positions > 1 and len(shown) >= positions:
        shown = np.partition(shown, len(shown) - positions + 1)[: len(shown) - positions + 1]
        inside = float(shown.sum())
    target = relative_error * (inside + float(mass.sum()))
    look = allocate(mass, model.variation, size, target, whole)
    if look.sum() > _SCAN_SHARE * len(cells.item):
        return exact_weights(cells, query, hidden)
    expected = predicted_variance(mass, model.variation, size, look)
    k = look[rest]
    first = np.where(k < size[rest], rng.integers(0, size[rest]), 0)
    rows_rest = runs(cells.start[:-1][rest], size[rest], first, k)
    logit_rest = score_rows(cells.vectors, query, rows_rest)
    logit_rest[contains(hidden, rows_rest)] = -np.inf
    seen = max(float(logit.max(initial=-np.inf)), float(logit_rest.max(initial=-np.inf)))
    if not np.isfinite(seen):
        return exact_weights(cells, query, hidden)
    weight, variance = np.zeros(cells.num_cells), np.zeros(cells.num_cells)
    bounds = np.cumsum(size[whole]) - size[whole]
    weight[whole] = np.add.reduceat(np.exp(logit - seen), bounds)
    if len(k):
        weight[rest], variance[rest] = _difference_estimates(
            logit_rest, k, size[rest], model.mean[rest], model.log_slope[rest], seen
        )
    return Weights(
        cells,
        query,
        hidden,
        weight,
        variance,
        seen,
        len(logit) + len(rows_rest),
        expected_variance=expected * float(np.exp(2.0 * min(shift - seen, 300.0))),
        rounding=_ROUNDING * max(abs(seen), 1.0),
    )


def _heads(cells: Cells, model: CellModel) -> list[IntArray]:
    """The outliers' cells and those that are to hold most; then more for a peaked policy."""
    ordinary = cells.num_cells - cells.always
    count = min(_PEAKED_CELLS, ordinary)
    most = np.argpartition(-model.log_mass[:ordinary], count - 1)[:count]
    most = most[np.argsort(-model.log_mass[most], kind="stable")]
    first = np.concatenate([most[:_HEAD_CELLS], np.arange(ordinary, cells.num_cells)])
    return [first, most[_HEAD_CELLS:]] if count > _HEAD_CELLS else [first]


def _difference_estimates(
    logit: FloatArray,
    k: IntArray,
    n: IntArray,
    mean: FloatArray,
    log_slope: FloatArray,
    shift: float,
) -> tuple[FloatArray, FloatArray]:
    """W_c and its estimated variance from k_c logits of each cell; see `retrieval.design`.

    Args:
        logit: (sum k,), one cell after the other.
        k, n: (C,) items looked at, and of the cell.
        mean, log_slope: (C,) of the cells' model.
        shift: results are relative to exp(shift).
    """
    slope = np.exp(log_slope - shift)
    steep = slope > 0.0
    value = np.exp(logit - shift)
    # Where there is no slope a logit may be -inf.
    lean = np.repeat(np.where(steep, slope, 0.0), k)
    value -= lean * np.where(lean > 0.0, logit - np.repeat(mean, k), 0.0)
    bounds = np.cumsum(k) - k
    total = np.add.reduceat(value, bounds)
    square = np.add.reduceat(value * value, bounds)
    # Of a simple random sample without replacement (Cochran, theorem 2.4).
    inside = np.maximum(square - total * total / k, 0.0) / np.maximum(k - 1.0, 1.0)
    return np.maximum(total, 0.0) * (n / k), n * (n - k) / k * inside
