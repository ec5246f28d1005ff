"""Draws and slates from weighted cells, with their propensities.

A slate without replacement (Plackett-Luce) is the order of arrival of independent exponential
clocks: an item of rate w arrives first with probability proportional to w. A cell's first arrival
has rate W_c, and the arrival times of its other items are drawn given that one (Gumbel-top-k; Kool
et al. 2019, "Stochastic Beams and Where to Find Them"). Only cells that can hold one of the
positions are scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.retrieval.cell_weights import TINY, CellWeights, exact_weights

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_FIRST_CELLS = 8
"""Cells scored in the first round of a slate; each further round doubles the number."""
_BLOCK = 512


@dataclass(frozen=True, eq=False)
class ItemSample:
    """n drawn items, or the n positions of a slate."""

    item: IntArray
    """(n,) item numbers."""
    pscore: FloatArray
    """(n,) propensities; in a slate, conditional on the positions before."""
    relative_error: FloatArray
    """(n,) standard error of pscore as a share of it; 0 if pscore is exact."""
    conditional_pscore: FloatArray
    """(n,) exact probability of the draw given the sampled rows."""
    rows_scored: int
    """Items whose logit was computed."""


def sample_with_replacement(
    weights: CellWeights, rng: np.random.Generator, size: int
) -> ItemSample:
    """Draw `size` items with replacement."""
    cumulative = np.cumsum(weights.weight)
    total = float(cumulative[-1])
    if not total > TINY:
        scored = weights.rows_scored
        weights = exact_weights(weights.cells, weights.query, weights.filter)
        weights.rows_scored += scored
        return sample_with_replacement(weights, rng, size)
    drawn = _invert(cumulative, np.zeros(size), np.full(size, total), rng.random(size))
    cell, which = np.unique(drawn, return_inverse=True)
    rows, logit, bounds = weights.logits(cell)
    ends = np.append(bounds[1:], len(rows))
    top = np.maximum.reduceat(logit, bounds)
    running = np.cumsum(np.exp(logit - np.repeat(top, ends - bounds)))
    before = np.where(bounds > 0, running[bounds - 1], 0.0)
    inside = running[ends - 1] - before
    index = _invert(running, before[which], inside[which], rng.random(size))
    log_inside = (top + np.log(inside))[which]
    conditional = np.log(weights.weight[drawn] / total) + logit[index] - log_inside
    if not weights.by_softmax:
        return _item_sample(weights, rows[index], conditional, conditional, np.zeros(size))
    error = weights.relative_error(np.full(size, weights.variance.sum()), np.full(size, total))
    log_pscore = logit[index] - weights.shift - np.log(total)
    return _item_sample(weights, rows[index], log_pscore, conditional, error)


def sample_slate(weights: CellWeights, rng: np.random.Generator, size: int) -> ItemSample:
    """Draw `size` positions without replacement."""
    if size == 1:
        return sample_with_replacement(weights, rng, 1)
    with np.errstate(divide="ignore"):
        log_weight = np.log(weights.weight) + weights.shift
    key = log_weight + _gumbel(rng, len(log_weight))
    count = min(size, len(key))
    order = np.argpartition(-key, count - 1)[:count]
    order = order[np.argsort(-key[order], kind="stable")]
    order = order[np.isfinite(key[order])]
    found: list[_Items] = []
    first, step = 0, _FIRST_CELLS
    while first < len(order):
        found.append(_arrivals(weights, rng, order[first : first + step], key, log_weight))
        first += step
        step *= 2
        keys = np.concatenate([part.key for part in found])
        if len(keys) >= size and first < len(order):
            last = np.partition(keys, len(keys) - size)[len(keys) - size]
            if last >= key[order[first]]:
                break
    if found:
        items = _Items.joined(found)
        if int(np.isfinite(items.key).sum()) >= size:
            result = _ranked(weights, items, log_weight, size)
            if result is not None:
                return result
    # The remaining mass underflows relative to the drawn items, or lies in cells without weight.
    return _sample_from_all_items(weights, rng, size)


@dataclass(frozen=True, eq=False)
class _Items:
    """Items of the cells that can hold a position of the slate, cell by cell."""

    row: IntArray
    logit: FloatArray
    """On the scale of the cell weights."""
    key: FloatArray
    """Negative log of the arrival time; -inf for an excluded item."""
    cell: IntArray

    @classmethod
    def joined(cls, parts: list[_Items]) -> _Items:
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("row", "logit", "key", "cell")
            )
        )


def _arrivals(
    weights: CellWeights,
    rng: np.random.Generator,
    cell: IntArray,
    cell_key: FloatArray,
    log_weight: FloatArray,
) -> _Items:
    """Arrival times of all items of some cells, given the first arrival in each cell."""
    rows, logit, bounds = weights.logits(cell)
    counts = np.diff(np.append(bounds, len(rows)))
    if not weights.by_softmax:
        top = np.maximum.reduceat(logit, bounds)
        inside = top + np.log(np.add.reduceat(np.exp(logit - np.repeat(top, counts)), bounds))
        logit = logit + np.repeat(log_weight[cell] - inside, counts)
    key = logit + _gumbel(rng, len(logit))
    most = np.repeat(np.maximum.reduceat(key, bounds), counts)
    first = np.repeat(cell_key[cell], counts)
    # Log of t_i - min t + T_c: the first item arrives when the cell does.
    with np.errstate(divide="ignore", invalid="ignore"):
        late = first - key + np.log1p(-np.exp(key - most))
        moved = first - np.maximum(late, 0.0) - np.log1p(np.exp(-np.abs(late)))
    moved[key == most] = first[key == most]
    moved[~np.isfinite(logit)] = -np.inf
    return _Items(rows, logit, moved, np.repeat(cell, counts))


def _ranked(
    weights: CellWeights, items: _Items, log_weight: FloatArray, size: int
) -> ItemSample | None:
    """The first `size` arrivals and their propensities; None if the remaining mass underflows."""
    chosen = np.argpartition(-items.key, size - 1)[:size]
    chosen = chosen[np.argsort(-items.key[chosen], kind="stable")]
    value = np.exp(items.logit - weights.shift)
    rest = value.copy()
    rest[chosen] = 0.0
    cells, first_of = np.unique(items.cell[chosen], return_index=True)
    entered = first_of[np.searchsorted(cells, items.cell[chosen])]
    is_first = entered == np.arange(size)
    # A cell counts with W_c up to its first drawn item, and with its remaining items after that.
    left = np.bincount(items.cell, rest, minlength=len(log_weight))[cells]
    whole = np.bincount(items.cell, value, minlength=len(log_weight))
    untouched = weights.weight.copy()
    untouched[cells] = 0.0
    known = weights.variance.copy()
    known[cells] = 0.0
    start = float(untouched.sum())
    total, variance = np.empty(size), np.empty(size)
    for begin in range(0, size, _BLOCK):
        position = np.arange(begin, min(begin + _BLOCK, size))[:, None]
        ahead = position <= first_of
        waiting = ~is_first & (entered < position) & (position <= np.arange(size))
        rows = slice(begin, begin + len(position))
        # Sum positive numbers only: the remaining mass may be tiny relative to the drawn items.
        total[rows] = start + ahead @ weights.weight[cells] + (~ahead) @ left
        total[rows] += waiting @ value[chosen]
        variance[rows] = float(known.sum()) + ahead @ weights.variance[cells]
    if not total.min() > TINY:
        return None
    log_pscore = items.logit[chosen] - weights.shift - np.log(total)
    if not weights.by_softmax:
        return _item_sample(weights, items.row[chosen], log_pscore, log_pscore, np.zeros(size))
    cell = items.cell[chosen]
    with np.errstate(divide="ignore"):
        entry = np.log(weights.weight[cell]) - np.log(whole[cell])
    conditional = log_pscore + np.where(is_first, entry, 0.0)
    error = weights.relative_error(variance, total)
    return _item_sample(weights, items.row[chosen], log_pscore, conditional, error)


def _sample_from_all_items(weights: CellWeights, rng: np.random.Generator, size: int) -> ItemSample:
    """Draw a slate from the logits of all items, in log space."""
    scored = weights.rows_scored
    if weights.all_logits is None:
        fresh = exact_weights(weights.cells, weights.query, weights.filter)
        scored += fresh.rows_scored
        weights = fresh
    weights.rows_scored = scored
    logit = weights.all_logits
    assert logit is not None
    key = logit + _gumbel(rng, len(logit))
    chosen = np.argpartition(-key, size - 1)[:size]
    chosen = chosen[np.argsort(-key[chosen], kind="stable")]
    rest = logit.copy()
    rest[chosen] = -np.inf
    top = float(rest.max())
    left = -np.inf if not np.isfinite(top) else top + float(np.log(np.exp(rest - top).sum()))
    total = np.logaddexp.accumulate(np.append(left, logit[chosen][::-1]))[:0:-1]
    log_pscore = logit[chosen] - total
    return _item_sample(weights, chosen, log_pscore, log_pscore, np.zeros(size))


def _item_sample(
    weights: CellWeights,
    row: IntArray,
    log_pscore: FloatArray,
    log_conditional: FloatArray,
    error: FloatArray,
) -> ItemSample:
    # An estimated probability may exceed 1.
    return ItemSample(
        weights.cells.item_of_row[row].astype(np.int64),
        np.exp(np.minimum(log_pscore, 0.0)),
        error,
        np.exp(np.minimum(log_conditional, 0.0)),
        weights.rows_scored,
    )


def _invert(
    running: FloatArray, before: FloatArray, inside: FloatArray, uniform: FloatArray
) -> IntArray:
    """Indices drawn by inverting intervals of a running sum; never one of zero weight."""
    value = np.minimum(before + uniform * inside, np.nextafter(before + inside, 0.0))
    return np.searchsorted(running, np.maximum(value, before), side="right")


def _gumbel(rng: np.random.Generator, size: int) -> FloatArray:
    """Standard Gumbel variables."""
    return -np.log(rng.standard_exponential(size))
