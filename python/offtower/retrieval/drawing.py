"""Draws and slates from weighted cells, with their propensities.

A slate without replacement is drawn all at once by the race of exponential clocks (Plackett-Luce):
an item of rate w arrives first with probability proportional to w, and the order of arrivals is a
slate. A cell's first arrival has rate W_c; when it has come, the cell's other items run on with
their own rates (Kool et al. 2019, "Stochastic Beams and Where to Find Them", for the arrival times
given the first). So no more cells are scored than could hold one of the positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.retrieval.weights import TINY, Weights, exact_weights

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_FIRST_CELLS = 8
"""Cells whose items are looked at first in a slate; twice as many each time after."""
_BLOCK = 512


@dataclass(frozen=True, eq=False)
class Draws:
    """n drawn items, or the n positions of a slate."""

    item: IntArray
    """(n,) item numbers."""
    pscore: FloatArray
    """(n,) propensities; of a slate, given the positions before."""
    relative_error: FloatArray
    """(n,) standard error of pscore as a share of it; 0 where pscore is exact."""
    conditional_pscore: FloatArray
    """(n,) probability of the draw given the items that were looked at; exact."""
    rows_scored: int
    """Items whose logit was computed."""


def independent(weights: Weights, rng: np.random.Generator, size: int) -> Draws:
    """`size` draws with replacement."""
    cumulative = np.cumsum(weights.weight)
    total = float(cumulative[-1])
    if not total > TINY:
        scored = weights.rows_scored
        weights = exact_weights(weights.cells, weights.query, weights.hidden)
        weights.rows_scored += scored
        return independent(weights, rng, size)
    drawn = _invert(cumulative, np.zeros(size), np.full(size, total), rng.random(size))
    cell, which = np.unique(drawn, return_inverse=True)
    rows, logit, bounds = weights.logits(cell)
    ends = np.append(bounds[1:], len(rows))
    top = np.maximum.reduceat(logit, bounds)
    running = np.cumsum(np.exp(logit - np.repeat(top, ends - bounds)))
    before = np.where(bounds > 0, running[bounds - 1], 0.0)
    inside = running[ends - 1] - before
    place = _invert(running, before[which], inside[which], rng.random(size))
    log_inside = (top + np.log(inside))[which]
    conditional = np.log(weights.weight[drawn] / total) + logit[place] - log_inside
    if not weights.by_softmax:
        return _draws(weights, rows[place], conditional, conditional, np.zeros(size))
    error = weights.relative_error(np.full(size, weights.variance.sum()), np.full(size, total))
    log_pscore = logit[place] - weights.shift - np.log(total)
    return _draws(weights, rows[place], log_pscore, conditional, error)


def slate(weights: Weights, rng: np.random.Generator, size: int) -> Draws:
    """`size` positions without replacement."""
    if size == 1:
        return independent(weights, rng, 1)
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
    # What is left underflows beside the items drawn, or lies in cells without weight.
    return _by_all_items(weights, rng, size)


@dataclass(frozen=True, eq=False)
class _Items:
    """Items of the cells that a slate could take from, one cell after the other."""

    row: IntArray
    logit: FloatArray
    """On the scale of the weights, with which the cells are a law."""
    key: FloatArray
    """- log of the arrival time; -inf for an item that must not be shown."""
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
    weights: Weights,
    rng: np.random.Generator,
    cell: IntArray,
    cell_key: FloatArray,
    log_weight: FloatArray,
) -> _Items:
    """Arrival times of all items of some cells, given the first arrival in each."""
    rows, logit, bounds = weights.logits(cell)
    counts = np.diff(np.append(bounds, len(rows)))
    if not weights.by_softmax:
        top = np.maximum.reduceat(logit, bounds)
        inside = top + np.log(np.add.reduceat(np.exp(logit - np.repeat(top, counts)), bounds))
        logit = logit + np.repeat(log_weight[cell] - inside, counts)
    key = logit + _gumbel(rng, len(logit))
    most = np.repeat(np.maximum.reduceat(key, bounds), counts)
    first = np.repeat(cell_key[cell], counts)
    # Times t_i - min t + T_c, in logarithms: the first item's is the cell's.
    with np.errstate(divide="ignore", invalid="ignore"):
        late = first - key + np.log1p(-np.exp(key - most))
        moved = first - np.maximum(late, 0.0) - np.log1p(np.exp(-np.abs(late)))
    moved[key == most] = first[key == most]
    moved[~np.isfinite(logit)] = -np.inf
    return _Items(rows, logit, moved, np.repeat(cell, counts))


def _ranked(weights: Weights, items: _Items, log_weight: FloatArray, size: int) -> Draws | None:
    """The `size` first arrivals with what was left at each; None where that underflows."""
    chosen = np.argpartition(-items.key, size - 1)[:size]
    chosen = chosen[np.argsort(-items.key[chosen], kind="stable")]
    value = np.exp(items.logit - weights.shift)
    rest = value.copy()
    rest[chosen] = 0.0
    cells, first_of = np.unique(items.cell[chosen], return_index=True)
    entered = first_of[np.searchsorted(cells, items.cell[chosen])]
    is_first = entered == np.arange(size)
    # Of a touched cell W_c counts up to its first item, its own items without the drawn ones after.
    left = np.bincount(items.cell, rest, minlength=len(log_weight))[cells]
    whole = np.bincount(items.cell, value, minlength=len(log_weight))
    untouched = weights.weight.copy()
    untouched[cells] = 0.0
    known = weights.variance.copy()
    known[cells] = 0.0
    start = float(untouched.sum())
    total, variance = np.empty(size), np.empty(size)
    for begin in range(0, size, _BLOCK):
        place = np.arange(begin, min(begin + _BLOCK, size))[:, None]
        ahead = place <= first_of
        waiting = ~is_first & (entered < place) & (place <= np.arange(size))
        rows = slice(begin, begin + len(place))
        # Only sums of positive numbers: what is left may be tiny beside what was drawn.
        total[rows] = start + ahead @ weights.weight[cells] + (~ahead) @ left
        total[rows] += waiting @ value[chosen]
        variance[rows] = float(known.sum()) + ahead @ weights.variance[cells]
    if not total.min() > TINY:
        return None
    log_pscore = items.logit[chosen] - weights.shift - np.log(total)
    if not weights.by_softmax:
        return _draws(weights, items.row[chosen], log_pscore, log_pscore, np.zeros(size))
    cell = items.cell[chosen]
    with np.errstate(divide="ignore"):
        entry = np.log(weights.weight[cell]) - np.log(whole[cell])
    conditional = log_pscore + np.where(is_first, entry, 0.0)
    error = weights.relative_error(variance, total)
    return _draws(weights, items.row[chosen], log_pscore, conditional, error)


def _by_all_items(weights: Weights, rng: np.random.Generator, size: int) -> Draws:
    """A slate from the logits of all items, in logarithms throughout."""
    scored = weights.rows_scored
    if weights.all_logits is None:
        fresh = exact_weights(weights.cells, weights.query, weights.hidden)
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
    return _draws(weights, chosen, log_pscore, log_pscore, np.zeros(size))


def _draws(
    weights: Weights,
    row: IntArray,
    log_pscore: FloatArray,
    log_conditional: FloatArray,
    error: FloatArray,
) -> Draws:
    # A probability is at most 1; an estimate of one may be a rounding or an error above.
    return Draws(
        weights.cells.item[row].astype(np.int64),
        np.exp(np.minimum(log_pscore, 0.0)),
        error,
        np.exp(np.minimum(log_conditional, 0.0)),
        weights.rows_scored,
    )


def _invert(
    running: FloatArray, before: FloatArray, inside: FloatArray, uniform: FloatArray
) -> IntArray:
    """Places drawn by inversion from stretches of a running sum; never one of zero weight."""
    value = np.minimum(before + uniform * inside, np.nextafter(before + inside, 0.0))
    return np.searchsorted(running, np.maximum(value, before), side="right")


def _gumbel(rng: np.random.Generator, size: int) -> FloatArray:
    """-log of standard exponential times."""
    return -np.log(rng.standard_exponential(size))
