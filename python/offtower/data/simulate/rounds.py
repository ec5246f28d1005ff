"""Draws of whole rounds by a logging policy, with the conditional propensity of each position."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.plackett_luce import (
    Array,
    IntArray,
    conditional_log_prob,
    draw_slates,
    tile_rows,
)
from offtower.data.simulate.policy_values import PolicyValues

_LEAST_LEFT = 1e-3
"""Where the items of a slate leave less mass, 1 minus their sum is inexact, and the mass is summed
over all items."""
_TRIES = 64


def draw_rounds(
    world: PolicyValues,
    policy: LoggingPolicy,
    contexts: pa.Table,
    size: int,
    rng: np.random.Generator,
) -> tuple[IntArray, Array]:
    """Draw a slate for each context.

    Args:
        world: of the items.
        policy: single-draw distribution.
        contexts: n rows.
        size: K.
        rng: source of the draws.

    Returns:
        item numbers (n, K), and their conditional log-probabilities (n, K).

    Raises:
        DataError: a context has fewer than K eligible items.
    """
    if policy.kind == "popularity" and world.eligible is None:
        return _draw_popular(world, policy, contexts.num_rows, size, rng)
    slates, found = [], []
    for chunk in _tiles(world, contexts):
        log_prob = single_draw(world, policy, chunk)
        slates.append(draw_slates(log_prob, size, rng))
        found.append(conditional_log_prob(log_prob, slates[-1]))
    return np.concatenate(slates), np.concatenate(found)


def rounds_log_prob(
    world: PolicyValues, policy: LoggingPolicy, contexts: pa.Table, slate: IntArray
) -> Array:
    """Compute (n, K) conditional log-probabilities of given slates."""
    if policy.kind == "popularity" and world.eligible is None:
        log_prob = _popularity(world, policy)
        return _conditional_of_one(log_prob, slate)
    found, first = [], 0
    for chunk in _tiles(world, contexts):
        own = slate[first : first + chunk.num_rows]
        found.append(conditional_log_prob(single_draw(world, policy, chunk), own))
        first += chunk.num_rows
    return np.concatenate(found)


def single_draw(world: PolicyValues, policy: LoggingPolicy, contexts: pa.Table) -> Array:
    """Compute (n, N) log pi_0 of a single draw; -inf for items that are not eligible."""
    latent = world.context_latent(contexts)
    if policy.kind == "contextual":
        logit = latent @ world.item_latent.T + world.item_logit
    else:
        logit = world.item_logit.expand(len(latent), -1)
    eligible = None if world.eligible is None else world.eligible.mask(contexts)
    return policy.served.log_prob((policy.beta * logit).numpy(), eligible)


def _tiles(world: PolicyValues, contexts: pa.Table) -> list[pa.Table]:
    rows = tile_rows(world.n_items)
    return [contexts.slice(start, rows) for start in range(0, contexts.num_rows, rows)]


def _popularity(world: PolicyValues, policy: LoggingPolicy) -> Array:
    """(N,) log pi_0, the same in every context."""
    logit = policy.beta * world.item_logit.numpy()[None, :]
    found: Array = policy.served.log_prob(logit)[0]
    return found


def _draw_popular(
    world: PolicyValues, policy: LoggingPolicy, rows: int, size: int, rng: np.random.Generator
) -> tuple[IntArray, Array]:
    """Draw with replacement until K items differ, which is Plackett-Luce, at O(K log N) a row."""
    log_prob = _popularity(world, policy)
    ends = np.cumsum(np.exp(log_prob))
    slate = np.full((rows, size), -1, dtype=np.int64)
    filled = np.zeros(rows, dtype=np.int64)
    open_rows = np.arange(rows)
    for _ in range(_TRIES):
        point = rng.random((len(open_rows), 2 * size)) * ends[-1]
        drawn = np.minimum(np.searchsorted(ends, point, side="right"), world.n_items - 1)
        for column in drawn.T:
            fresh = (slate[open_rows] != column[:, None]).all(axis=1)
            fresh &= filled[open_rows] < size
            slate[open_rows[fresh], filled[open_rows[fresh]]] = column[fresh]
            filled[open_rows[fresh]] += 1
        open_rows = np.flatnonzero(filled < size)
        if not len(open_rows):
            break
    for row in open_rows:
        # A few items hold nearly all mass: continue from all the others.
        rest = log_prob.copy()
        rest[slate[row, : filled[row]]] = -np.inf
        slate[row, filled[row] :] = draw_slates(rest[None, :], size - filled[row], rng)[0]
    return slate, _conditional_of_one(log_prob, slate)


def _conditional_of_one(log_prob: Array, slate: IntArray) -> Array:
    """(n, K) conditional log-probabilities where all rows share log_prob (N,)."""
    shown = log_prob[slate]
    above = np.cumsum(np.exp(shown), axis=1)
    left = 1.0 - np.concatenate([np.zeros((len(slate), 1)), above[:, :-1]], axis=1)
    close: NDArray[np.bool_] = 1.0 - above[:, -1] < _LEAST_LEFT
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = shown - np.log(left)
    for row in np.flatnonzero(close):
        found[row] = conditional_log_prob(log_prob[None, :], slate[row][None, :])[0]
    return found
