"""True values of slate policies: exact over all slates of small catalogues, Monte Carlo otherwise.

A policy is given by its single-draw log-probabilities; its slates are Plackett-Luce. Contexts are
given or drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.simulate.drift import WEEKS
from offtower.data.simulate.plackett_luce import (
    LOGITS,
    all_slates,
    draw_slates,
    slate_probabilities,
    tile_rows,
)
from offtower.data.simulate.policy_values import SingleDraw
from offtower.data.simulate.rounds import single_draw
from offtower.data.simulate.world import SimulatedWorld

Array = NDArray[np.float64]
EXACT_SLATES = 5_000
"""Slates of a catalogue up to which values are sums over all of them."""
_SCORED = 1_000_000
"""Pairs of contexts and items scored for `logging_value`."""
DRAWS = 16
"""Slates drawn for each context in a larger catalogue."""


@dataclass(frozen=True)
class SlateValue:
    """Value of a slate policy: expected sum of a round's rewards.

    Attributes:
        value: mean over contexts.
        std_error: of the drawn contexts and, unless `exact`, of the drawn slates.
        draw_error: standard error of the drawn slates alone, for these contexts; 0 if `exact`.
        by_position: (K,) expected reward of each position.
        exact: whether the sum over slates is exact.
    """

    value: float
    std_error: float
    draw_error: float
    by_position: Array
    exact: bool


def slate_value(
    world: SimulatedWorld,
    policy: SingleDraw,
    contexts: pa.Table,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> SlateValue:
    """Compute the value of a policy that draws slates, in these contexts.

    Catalogues with up to EXACT_SLATES slates are enumerated. In larger ones, `draws` slates are
    drawn for each context, and the expected rewards of each are exact.

    Args:
        policy: single-draw log-probabilities.
        contexts: n rows, for instance `world.contexts(n)`, or the contexts of a log.
        draws: slates for each context, at least 2.
        seed: of the draws.
    """
    size = world.slate_size
    exact = math.perm(world.n_items, size) <= EXACT_SLATES
    slates = all_slates(world.n_items, size) if exact else np.zeros((0, size), dtype=np.int64)
    rows = max(1, LOGITS // (world.n_items * len(slates))) if exact else tile_rows(world.n_items)
    rng = np.random.default_rng(seed)
    means, variances = [], []
    for start in range(0, contexts.num_rows, rows):
        chunk = contexts.slice(start, rows)
        log_prob = policy(chunk)
        if exact:
            means.append(_enumerated(world, chunk, log_prob, slates))
            variances.append(np.zeros(chunk.num_rows))
        else:
            drawn = np.stack(
                [world.slate_rewards(chunk, draw_slates(log_prob, size, rng)) for _ in range(draws)]
            )
            means.append(drawn.mean(axis=0))
            variances.append(drawn.sum(axis=2).var(axis=0, ddof=1) / draws)
    return _value(np.concatenate(means), np.concatenate(variances), exact)


def fixed_slate_value(
    world: SimulatedWorld, slates: NDArray[np.int64], contexts: pa.Table
) -> SlateValue:
    """Compute the value of a policy that shows slate i (n, K) in context i, such as the k best."""
    return _value(world.slate_rewards(contexts, slates), np.zeros(contexts.num_rows), True)


def logging_value(world: SimulatedWorld, seed: int = 0) -> SlateValue:
    """Estimate the value of the world's logging policy over new contexts: 1,000 of them, or fewer
    in catalogues of more than a thousand items, which bounds the time."""
    contexts = world.contexts(max(50, min(1_000, _SCORED // world.n_items)), seed)
    return slate_value(world, partial(single_draw, world, world.logging_policy), contexts)


def logging_value_of_week(world: SimulatedWorld, week: int, seed: int = 0) -> float:
    """The value of the logging policy in a week of a world that drifts, from 0.

    The mean over a time of each of its days, of up to 200 new contexts.
    """
    drift = world.settings.drift
    assert drift is not None, "callers check that the world drifts"
    contexts = world.contexts(max(50, min(200, _SCORED // world.n_items)), seed)
    policy = world.logging_policy
    if 2 * week >= WEEKS:
        policy = drift.late(policy)
    draw = partial(single_draw, world, policy)
    values = [slate_value(world.at(time), draw, contexts).value for time in drift.week_times(week)]
    return float(np.mean(values))


def _value(by_context: Array, variance: Array, exact: bool) -> SlateValue:
    """Of (n, K) expected rewards, whose sums have the variances (n,) of drawn slates."""
    totals, n = by_context.sum(axis=1), len(by_context)
    spread = totals.std(ddof=1) if n > 1 else np.nan
    return SlateValue(
        float(totals.mean()),
        float(spread / np.sqrt(n)),
        float(np.sqrt(variance.sum()) / n),
        by_context.mean(axis=0),
        exact,
    )


def _enumerated(
    world: SimulatedWorld, contexts: pa.Table, log_prob: Array, slates: NDArray[np.int64]
) -> Array:
    """(n, K) expected rewards, summed over all slates."""
    count = len(slates)
    probability = slate_probabilities(log_prob, slates)
    row = pa.array(np.repeat(np.arange(contexts.num_rows), count))
    reward = world.slate_rewards(contexts.take(row), np.tile(slates, (contexts.num_rows, 1)))
    reward = reward.reshape(contexts.num_rows, count, -1)
    expected: Array = np.einsum("bs,bsk->bk", probability, reward)
    return expected
