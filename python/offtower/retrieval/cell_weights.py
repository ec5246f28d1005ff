"""Weights W_c of the cells for one context: exact, estimated, or predicted by the cells' model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.retrieval.allocation import CellModel, allocate, model_cells, predicted_variance
from offtower.retrieval.cells import Cells
from offtower.retrieval.row_filter import RowFilter
from offtower.retrieval.scoring import ranges, runs, score_rows

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TINY = 1e-200
"""A smaller remainder of a sum of weights is rounding error."""
_HEAD_CELLS = 32
"""Cells that are scored whole first; their mass sets the accuracy that the rest needs."""
_PEAKED_CELLS = 128
"""Cells scored whole where the first ones hold more than _PEAKED_SHARE of the mass: single items
dominate then, which the model of the cells' masses predicts poorly."""
_PEAKED_SHARE = 0.5
_ROUNDING = 2.0**-22
_MOST_REFINED = 16_384
_REFINED_NATS = (40.0, 12.0)
"""Distance from the largest logit within which items are scored in float64 too: the larger one
where that is at most _MOST_REFINED items."""
_SCAN_SHARE = 0.4
"""The whole catalogue is scored where the samples would exceed this share of it."""
_LEAST_LOG_DEVIATION = -300.0
"""Cells with a smaller predicted deviation are left out of the calibration: they underflow."""


@dataclass(eq=False)
class CellWeights:
    """Weights of the cells for one context, relative to exp(shift)."""

    cells: Cells
    query: NDArray[np.float32]
    filter: RowFilter
    """Rows of items that may be drawn."""
    weight: FloatArray
    """(C,) W_c."""
    variance: FloatArray
    """(C,) variance of W_c, estimated from its sample; 0 where W_c is exact."""
    shift: float
    rows_scored: int
    """Items whose logit was computed."""
    by_softmax: bool = True
    """Whether W_c estimates the softmax's mass; otherwise it defines a distribution of its own."""
    expected_variance: float = 0.0
    """Variance of sum W_c that the calibrated model of the cells predicts. A sample that missed its
    cell's few large items underestimates its own variance, so the larger of the two is reported.
    Calibration: the mean over cells of observed over predicted variance, at least 1."""
    rounding: float = 0.0
    """Relative error of pscore from the rounding of float32 logits."""
    all_logits: FloatArray | None = None
    """(N,) by row, if every item was scored."""

    def relative_error(self, variance: FloatArray, total: FloatArray) -> FloatArray:
        """Standard error of pscore as a share of it, where sum W_c has `total` left."""
        known = np.maximum(variance, self.expected_variance)
        return np.asarray(np.hypot(np.sqrt(known) / total, self.rounding))

    def logits(self, cell: IntArray) -> tuple[IntArray, FloatArray, IntArray]:
        """All items of some cells, cell by cell.

        Returns:
            rows (n,), their logits (n,) (-inf for excluded items), and the offset of each cell.
        """
        size = self.cells.start[cell + 1] - self.cells.start[cell]
        rows = ranges(self.cells.start[cell], size)
        if self.all_logits is not None:
            logit = self.all_logits[rows]
        else:
            logit = _logits_of(self.cells, self.query, rows, self.filter)
            self.rows_scored += len(rows)
        return rows, logit, np.cumsum(size) - size


def model_weights(cells: Cells, query: NDArray[np.float32], allowed: RowFilter) -> CellWeights:
    """Weights by the cells' model, without scoring any item."""
    log_mass = model_cells(cells, query).log_mass
    if allowed.gone.any():
        with np.errstate(divide="ignore"):
            log_mass = log_mass + np.log1p(-allowed.gone / cells.size)
    shift = float(log_mass.max())
    weight = np.exp(log_mass - shift)
    # Keep every cell's probability positive: another policy may prefer an item of any of them.
    weight[(weight < TINY) & np.isfinite(log_mass)] = TINY
    return CellWeights(
        cells, query, allowed, weight, np.zeros(len(weight)), shift, 0, by_softmax=False
    )


def exact_weights(cells: Cells, query: NDArray[np.float32], allowed: RowFilter) -> CellWeights:
    """Every item scored."""
    logit = (cells.vectors @ query).astype(np.float64)
    _refine(cells, query, logit)
    allowed.mask(logit)
    shift = float(logit.max())
    weight = np.add.reduceat(np.exp(logit - shift), cells.start[:-1])
    nothing = np.zeros(len(weight))
    return CellWeights(cells, query, allowed, weight, nothing, shift, len(logit), all_logits=logit)


def _refine(cells: Cells, query: NDArray[np.float32], logit: FloatArray) -> None:
    """Score the items of largest logit again in float64; of a small catalogue all items.

    A float32 logit near 60 is off by up to 1e-5, as is the log-probability of its item.
    """
    row = np.arange(len(logit))
    if len(logit) > _MOST_REFINED:
        top = logit.max()
        for nats in _REFINED_NATS:
            row = np.flatnonzero(logit > top - nats)
            if len(row) <= _MOST_REFINED:
                break
        else:
            return
    logit[row] = cells.vectors[row].astype(np.float64) @ query.astype(np.float64)


def estimated_weights(
    cells: Cells,
    query: NDArray[np.float32],
    rng: np.random.Generator,
    allowed: RowFilter,
    *,
    positions: int,
    relative_error: float,
) -> CellWeights:
    """Score the dominant cells whole and a random sample of every other cell.

    Args:
        allowed: rows that may be drawn.
        positions: positions of the slate that is to be drawn.
        relative_error: target standard error of sum W_c, as a share of it.
    """
    size = cells.size
    touched = np.flatnonzero(allowed.gone) if allowed.gone.any() else None
    model = model_cells(cells, query, touched)
    if allowed.bits is not None:
        model = model.thinned(1.0 - allowed.gone / size)
    head = _score_head(cells, query, allowed, model)
    if head is None:
        return exact_weights(cells, query, allowed)
    rest = np.ones(cells.num_cells, dtype=bool)
    rest[head.cell] = False
    mass = np.where(rest, np.exp(np.minimum(model.log_mass - head.shift, 0.0)), 0.0)
    # The last position of a slate must be as exact as the first: aim at the mass that is left when
    # the largest items have been drawn.
    value = np.exp(head.logit - head.shift)
    if 1 < positions <= len(value):
        value = np.partition(value, len(value) - positions + 1)[: len(value) - positions + 1]
    target = relative_error * (float(value.sum()) + float(mass.sum()))
    count = allocate(mass, model.variation, size, target, head.cell)
    if count.sum() > _SCAN_SHARE * len(cells.item_of_row):
        return exact_weights(cells, query, allowed)
    predicted = predicted_variance(mass, model.variation, size, count)
    k, n = count[rest], size[rest]
    first = np.where(k < n, rng.integers(0, n), 0)
    rows = runs(cells.start[:-1][rest], n, first, k)
    logit = _logits_of(cells, query, rows, allowed)
    shift = max(float(head.logit.max(initial=-np.inf)), float(logit.max(initial=-np.inf)))
    if not np.isfinite(shift):
        return exact_weights(cells, query, allowed)
    weight, variance = np.zeros(cells.num_cells), np.zeros(cells.num_cells)
    bounds = np.cumsum(size[head.cell]) - size[head.cell]
    weight[head.cell] = np.add.reduceat(np.exp(head.logit - shift), bounds)
    # The cells' own deviations S_c over those that the model predicts, in both groups of cells.
    log_deviation = model.log_mass + np.log(np.maximum(model.variation, TINY)) - np.log(size)
    ordinary = head.cell < cells.num_cells - cells.outlier_cells
    inner = head.cell[ordinary]
    _, square = _difference_sums(
        head.logit[np.repeat(ordinary, size[head.cell])], size[inner], model, inner, shift
    )
    calibration = max(1.0, _mean_ratio(square, log_deviation[inner] - shift, size[inner]))
    if len(k):
        total, square = _difference_sums(logit, k, model, np.flatnonzero(rest), shift)
        weight[rest], variance[rest] = np.maximum(total, 0.0) * (n / k), n * (n - k) / k * square
        calibration = max(calibration, _mean_ratio(square, log_deviation[rest] - shift, k))
    return CellWeights(
        cells,
        query,
        allowed,
        weight,
        variance,
        shift,
        len(head.logit) + len(rows),
        expected_variance=calibration
        * float(predicted.sum())
        * float(np.exp(2.0 * min(head.shift - shift, 300.0))),
        rounding=_ROUNDING * max(abs(shift), 1.0),
    )


@dataclass(frozen=True, eq=False)
class _Head:
    """Cells that are scored whole before anything is sampled."""

    cell: IntArray
    logit: FloatArray
    """Of all their items, cell by cell."""
    shift: float
    """At least each of these logits and the log mass that the model predicts of other cells."""


def _score_head(
    cells: Cells, query: NDArray[np.float32], allowed: RowFilter, model: CellModel
) -> _Head | None:
    """Score the outlier cells and those of the largest predicted mass; None where nothing is left.

    A second, larger group follows where the first holds more than _PEAKED_SHARE of the mass.
    """
    ordinary = cells.num_cells - cells.outlier_cells
    count = min(_PEAKED_CELLS, ordinary)
    top = np.argpartition(-model.log_mass[:ordinary], count - 1)[:count]
    top = top[np.argsort(-model.log_mass[top], kind="stable")]
    cell = np.concatenate([top[:_HEAD_CELLS], np.arange(ordinary, cells.num_cells)])
    more = top[_HEAD_CELLS:]
    logit = np.zeros(0)
    rest = np.ones(cells.num_cells, dtype=bool)
    scored = cell
    while True:
        rest[scored] = False
        rows = ranges(cells.start[scored], cells.size[scored])
        logit = np.concatenate([logit, _logits_of(cells, query, rows, allowed)])
        left = model.log_mass[rest]
        shift = max(float(logit.max(initial=-np.inf)), float(left.max(initial=-np.inf)))
        if not np.isfinite(shift):
            return None
        inside = float(np.exp(logit - shift).sum())
        outside = float(np.exp(np.minimum(left - shift, 0.0)).sum())
        if not len(more) or inside < _PEAKED_SHARE * (inside + outside):
            return _Head(cell, logit, shift)
        cell, scored, more = np.concatenate([cell, more]), more, more[:0]


def _logits_of(
    cells: Cells, query: NDArray[np.float32], rows: IntArray, allowed: RowFilter
) -> FloatArray:
    logit = score_rows(cells.vectors, query, rows)
    logit[allowed.refuses(rows)] = -np.inf
    return logit


def _difference_sums(
    logit: FloatArray, k: IntArray, model: CellModel, cell: IntArray, shift: float
) -> tuple[FloatArray, FloatArray]:
    """Sum and sample variance of g(s) over k_c logits of each cell; see `retrieval.allocation`.

    Args:
        logit: (sum k,), cell by cell.
        shift: results are relative to exp(shift).
    """
    slope = np.exp(model.log_slope[cell] - shift)
    value = np.exp(logit - shift)
    # Without a slope a logit may be -inf.
    per_item = np.repeat(slope, k)
    value -= per_item * np.where(per_item > 0.0, logit - np.repeat(model.mean[cell], k), 0.0)
    bounds = np.cumsum(k) - k
    total = np.add.reduceat(value, bounds)
    square = np.add.reduceat(value * value, bounds)
    # Simple random sampling without replacement (Cochran, theorem 2.4).
    return total, np.maximum(square - total * total / k, 0.0) / np.maximum(k - 1.0, 1.0)


def _mean_ratio(square: FloatArray, log_deviation: FloatArray, k: IntArray) -> float:
    """Mean over cells of the sample variance of g over the variance that the model predicts."""
    known = (k > 1) & (log_deviation > _LEAST_LOG_DEVIATION)
    if not known.any():
        return 1.0
    return float(np.mean(square[known] * np.exp(-2.0 * log_deviation[known])))
