"""Draws from a mixture of the cells' distribution and of uniform draws, with their propensities.

With every item scored, the log-probabilities of the mixture take the place of the logits, and
`cell_sampling` draws from them. Otherwise a draw is uniform with probability eps, and comes from
the cells' weights else:

    pscore = (1 - eps) exp(s_a) / Z^ + eps / n

A slate takes independent draws one after another and keeps the first of each item: sampling without
replacement (Plackett and Luce).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from offtower.config import NewItemsConfig, ServingConfig
from offtower.retrieval.cell_sampling import ItemSample, sample_with_replacement
from offtower.retrieval.cell_weights import TINY, CellWeights, exact_weights

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_MAX_DRAWS = 1 << 17
"""Slates that would take more draws are drawn from the scores of all items."""


def served_weights(
    weights: CellWeights, serving: ServingConfig, new: NDArray[np.bool_] | None = None
) -> CellWeights:
    """Restrict exact weights to the best items, mix them with uniform draws, and limit the share of
    new items.

    new: (N,) the new items, where their share has limits.

    Weights of sampled cells are returned as they are: `mixed_draws` and `mixed_slate` mix them.
    """
    logit = weights.all_logits
    limits = serving.new_items
    if logit is None or (serving.top is None and serving.uniform == 0.0 and limits is None):
        return weights
    softmax = logit
    if serving.top is not None:
        softmax = np.full_like(logit, -np.inf)
        best = _best(logit, weights.cells.item_of_row, serving.top)
        softmax[best] = logit[best]
    if serving.uniform > 0.0:
        top = float(softmax.max())
        log_normalizer = top + math.log(float(np.exp(softmax - top).sum()))
        eligible = np.isfinite(logit)
        share = math.log(serving.uniform) - math.log(int(eligible.sum()))
        rest = math.log1p(-serving.uniform) if serving.uniform < 1.0 else -math.inf
        softmax = np.logaddexp(softmax - log_normalizer + rest, np.where(eligible, share, -np.inf))
    if limits is not None:
        assert new is not None, "an export with limits has the new items"
        softmax = _limited(softmax, new[weights.cells.item_of_row], limits)
    shift = float(softmax.max())
    weight = np.add.reduceat(np.exp(softmax - shift), weights.cells.start[:-1])
    return replace(
        weights,
        weight=weight,
        variance=np.zeros(len(weight)),
        shift=shift,
        by_softmax=True,
        all_logits=softmax,
    )


def _limited(logit: FloatArray, is_new: NDArray[np.bool_], limits: NewItemsConfig) -> FloatArray:
    """Log-probabilities with the limits of `serving.limits`, from log-probabilities up to a
    constant."""
    with np.errstate(divide="ignore"):
        by_kind = [np.logaddexp.reduce(logit[is_new == kind]) for kind in (False, True)]
        mass = float(np.exp(by_kind[1] - np.logaddexp(*by_kind)))
        if not 0.0 < mass < 1.0:
            return logit
        share = min(max(mass, limits.at_least), limits.at_most)
        wanted = np.log([1.0 - share, share])
    return np.asarray(logit + np.where(is_new, wanted[1] - by_kind[1], wanted[0] - by_kind[0]))


def mixed_draws(
    weights: CellWeights, rng: np.random.Generator, size: int, uniform: float
) -> ItemSample:
    """Draw `size` items with replacement. uniform: share of uniform draws, above 0."""
    weights = _usable(weights)
    row = _rows(weights, rng, size, uniform)
    softmax, conditional = _log_probabilities(weights, row)
    pscore = _mixed(softmax, weights, uniform)
    share = (1.0 - uniform) * np.exp(softmax) / pscore
    total = float(weights.weight.sum())
    error = share * float(weights.relative_error(np.array(weights.variance.sum()), np.array(total)))
    return _sample(weights, row, pscore, _mixed(conditional, weights, uniform), error)


def mixed_slate(
    weights: CellWeights, rng: np.random.Generator, size: int, uniform: float
) -> ItemSample | None:
    """Draw `size` positions without replacement; None where that would take too many draws."""
    count = weights.filter.left
    if uniform * (1.0 - (size - 1) / count) * _MAX_DRAWS < size:
        return None
    weights = _usable(weights)
    row = np.zeros(0, dtype=np.int64)
    step = 2 * size
    while len(row) < size:
        row = np.concatenate([row, _rows(weights, rng, step, uniform)])
        _, first = np.unique(row, return_index=True)
        row = row[np.sort(first)]
        step = min(2 * step, _MAX_DRAWS)
    row = row[:size]
    softmax, conditional = _log_probabilities(weights, row)
    left = (count - np.arange(size)) / count
    drawn = _before(np.exp(softmax))
    rest = (1.0 - uniform) * np.maximum(1.0 - drawn, 0.0) + uniform * left
    pscore = _mixed(softmax, weights, uniform)
    total = float(weights.weight.sum())
    one = float(weights.relative_error(np.array(weights.variance.sum()), np.array(total)))
    # Of the estimated normalizer, in the propensity of one draw and in the mass that is left.
    error = one * (1.0 - uniform) * (np.exp(softmax) / pscore + drawn / rest)
    exact = _mixed(conditional, weights, uniform)
    known = (1.0 - uniform) * np.maximum(1.0 - _before(np.exp(conditional)), 0.0) + uniform * left
    return _sample(
        weights, row, np.minimum(pscore / rest, 1.0), np.minimum(exact / known, 1), error
    )


def _best(logit: FloatArray, item: NDArray[np.integer], count: int) -> IntArray:
    """Rows of the `count` largest logits; ties go to the lowest item number."""
    if count >= len(logit):
        return np.flatnonzero(np.isfinite(logit))
    least = -np.partition(-logit, count - 1)[count - 1]
    above = np.flatnonzero(logit > least)
    equal = np.flatnonzero(logit == least)
    equal = equal[np.argsort(item[equal], kind="stable")][: count - len(above)]
    best = np.concatenate([above, equal])
    return np.asarray(best[np.isfinite(logit[best])])


def _usable(weights: CellWeights) -> CellWeights:
    if float(weights.weight.sum()) > TINY:
        return weights
    fresh = exact_weights(weights.cells, weights.query, weights.filter)
    fresh.rows_scored += weights.rows_scored
    return fresh


def _rows(weights: CellWeights, rng: np.random.Generator, size: int, uniform: float) -> IntArray:
    """(n,) rows drawn with replacement."""
    from_cells = sample_with_replacement(weights, rng, size)
    row = weights.cells.row_of_item[from_cells.item].astype(np.int64)
    other = weights.filter.uniform(rng, size)
    return np.asarray(np.where(rng.random(size) < uniform, other, row))


def _log_probabilities(weights: CellWeights, row: IntArray) -> tuple[FloatArray, FloatArray]:
    """(n,) log-probabilities of rows by the cells' weights: as a propensity, and as drawn."""
    cell, which = np.unique(weights.cells.cell_of(row), return_inverse=True)
    rows, logit, bounds = weights.logits(cell)
    ends = np.append(bounds[1:], len(rows))
    top = np.maximum.reduceat(logit, bounds)
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = np.add.reduceat(np.exp(logit - np.repeat(top, ends - bounds)), bounds)
        log_inside = (top + np.log(inside))[which]
        own = logit[bounds[which] + row - weights.cells.start[cell[which]]]
        log_total = math.log(float(weights.weight.sum()))
        conditional = np.log(weights.weight[cell[which]]) - log_total + own - log_inside
    if not weights.by_softmax:
        return conditional, conditional
    return own - weights.shift - log_total, conditional


def _mixed(log_softmax: FloatArray, weights: CellWeights, uniform: float) -> FloatArray:
    return np.asarray((1.0 - uniform) * np.exp(log_softmax) + uniform / weights.filter.left)


def _before(value: FloatArray) -> FloatArray:
    """Sum of the values before each."""
    return np.append(0.0, np.cumsum(value)[:-1])


def _sample(
    weights: CellWeights,
    row: IntArray,
    pscore: FloatArray,
    conditional: FloatArray,
    error: FloatArray,
) -> ItemSample:
    if not weights.by_softmax:
        error = np.zeros(len(row))
    return ItemSample(
        weights.cells.item_of_row[row].astype(np.int64),
        np.minimum(pscore, 1.0),
        error,
        np.minimum(conditional, 1.0),
        weights.rows_scored,
    )
