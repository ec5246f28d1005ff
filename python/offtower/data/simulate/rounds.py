"""Draws of whole rounds by a logging policy, with the conditional propensity of each position.

Small catalogues are handled by arrays over all items. In larger ones items are drawn with
replacement until K differ, which is Plackett-Luce, and the mass that is left is 1 minus the sum of
the items above, in float64; rows whose items hold nearly all mass are scored whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower import ops
from offtower.data.simulate.large_draws import FLOAT64_ITEMS, draw_items
from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.plackett_luce import (
    Array,
    IntArray,
    conditional_log_prob,
    draw_slates,
    tile_rows,
)
from offtower.data.simulate.policy_values import PolicyValues

DENSE_ITEMS = FLOAT64_ITEMS
"""Items up to which rounds are drawn from arrays over all items."""
_LARGE_ROWS = 1024
"""Contexts drawn for at a time in larger catalogues."""
_LEAST_LEFT = 1e-3
"""Where the items of a slate leave less mass, 1 minus their sum is inexact, and the mass is summed
over all items."""
_TRIES = 64

LogProbs = Callable[[IntArray], Array]
"""Maps row numbers (m,) to log-probabilities (m, N) of a single draw."""


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
    parts = []
    if policy.kind == "popularity" and world.eligible is None:
        parts.append(_draw_popular(world, policy, contexts.num_rows, size, rng))
    elif world.n_items > DENSE_ITEMS:
        for chunk in _chunks(contexts, _LARGE_ROWS):
            parts.append(_Scored(world, policy, chunk).draw(size, rng))
    else:
        for chunk in _chunks(contexts, tile_rows(world.n_items)):
            log_prob = single_draw(world, policy, chunk)
            slate = draw_slates(log_prob, size, rng)
            parts.append((slate, conditional_log_prob(log_prob, slate)))
    slates, found = zip(*parts, strict=True)
    return np.concatenate(slates), np.concatenate(found)


def rounds_log_prob(
    world: PolicyValues, policy: LoggingPolicy, contexts: pa.Table, slate: IntArray
) -> Array:
    """Compute (n, K) conditional log-probabilities of given slates."""
    if policy.kind == "popularity" and world.eligible is None:
        log_prob = _popularity(world, policy)
        return _conditional(log_prob[slate], slate, _shared(log_prob))
    large, found, first = world.n_items > DENSE_ITEMS, [], 0
    for chunk in _chunks(contexts, _LARGE_ROWS if large else tile_rows(world.n_items)):
        own = slate[first : first + chunk.num_rows]
        first += chunk.num_rows
        if large:
            found.append(_Scored(world, policy, chunk).conditional_log_prob(own))
        else:
            found.append(conditional_log_prob(single_draw(world, policy, chunk), own))
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


class _Scored:
    """Contexts of a large catalogue, which the operators score in tiles of items."""

    def __init__(self, world: PolicyValues, policy: LoggingPolicy, contexts: pa.Table) -> None:
        self.policy = policy
        self.rows = contexts.num_rows
        latent = world.context_latent(contexts)
        self.context = policy.context_factor(latent)
        self.item = policy.item_factor(world.item_latent)
        self.bias = policy.beta * world.item_logit
        self.eligible = world.eligibility(contexts)
        self.count: IntArray = np.full(self.rows, world.n_items)
        if self.eligible is not None:
            self.count = self.eligible.count(world.n_items).numpy()
        self._log_prob: LogProbs = lambda rows: single_draw(
            world, policy, contexts.take(pa.array(rows))
        )

    def draw(self, size: int, rng: np.random.Generator) -> tuple[IntArray, Array]:
        """Draw (B, K) slates with their conditional log-probabilities."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        draws: Any = {
            "eligible": self.eligible,
            "generator": generator,
            "num_samples": 2 * size + 4,
        }
        drawn, log_normalizer = draw_items(self.context, self.item, self.bias, **draws)
        flat = torch.zeros(self.rows, 1), torch.zeros(len(self.item), 1)
        uniform, _ = ops.sample_softmax(*flat, **draws)
        mixed = np.where(rng.random(drawn.shape) < self.policy.epsilon, uniform, drawn)
        slate = np.full((self.rows, size), -1, dtype=np.int64)
        filled = np.zeros(self.rows, dtype=np.int64)
        _keep_distinct(slate, filled, np.arange(self.rows), mixed)
        _complete(slate, filled, self._log_prob, rng)
        return slate, self._conditional(slate, log_normalizer[:, None].numpy())

    def conditional_log_prob(self, slate: IntArray) -> Array:
        """(B, K) of given slates."""
        terms = ops.policy_terms(
            self.context,
            self.item,
            torch.from_numpy(slate[:, 0].copy()),
            item_bias=self.bias,
            eligible=self.eligible,
        )
        return self._conditional(slate, terms.log_normalizer[:, None].numpy())

    def _conditional(self, slate: IntArray, log_normalizer: Array) -> Array:
        softmax = self._logit(torch.from_numpy(slate)).numpy() - log_normalizer
        with np.errstate(divide="ignore"):
            share = np.log(self.policy.epsilon) - np.log(self.count)[:, None]
            shown = np.logaddexp(np.log1p(-self.policy.epsilon) + softmax, share)
        return _conditional(shown, slate, self._log_prob)

    def _logit(self, item: Tensor) -> Tensor:
        """(B, m) logits of the items (B, m)."""
        return torch.einsum("bl,bml->bm", self.context, self.item[item]) + self.bias[item]


def _chunks(contexts: pa.Table, rows: int) -> list[pa.Table]:
    return [contexts.slice(start, rows) for start in range(0, contexts.num_rows, rows)]


def _popularity(world: PolicyValues, policy: LoggingPolicy) -> Array:
    """(N,) log pi_0, the same in every context."""
    logit = policy.beta * world.item_logit.numpy()[None, :]
    found: Array = policy.served.log_prob(logit)[0]
    return found


def _shared(log_prob: Array) -> LogProbs:
    return lambda rows: np.tile(log_prob, (len(rows), 1))


def _draw_popular(
    world: PolicyValues, policy: LoggingPolicy, rows: int, size: int, rng: np.random.Generator
) -> tuple[IntArray, Array]:
    """As `draw_rounds`, at O(K log N) a row."""
    log_prob = _popularity(world, policy)
    ends = np.cumsum(np.exp(log_prob))
    slate = np.full((rows, size), -1, dtype=np.int64)
    filled = np.zeros(rows, dtype=np.int64)
    for _ in range(_TRIES):
        missing = np.flatnonzero(filled < size)
        if not len(missing):
            break
        point = rng.random((len(missing), 2 * size)) * ends[-1]
        drawn = np.minimum(np.searchsorted(ends, point, side="right"), world.n_items - 1)
        _keep_distinct(slate, filled, missing, drawn)
    _complete(slate, filled, _shared(log_prob), rng)
    return slate, _conditional(log_prob[slate], slate, _shared(log_prob))


def _keep_distinct(slate: IntArray, filled: IntArray, row: IntArray, drawn: IntArray) -> None:
    """Append the items (m, t) drawn for some rows (m,), except those that are there already."""
    size = slate.shape[1]
    for item in drawn.T:
        fresh = (slate[row] != item[:, None]).all(axis=1) & (filled[row] < size)
        slate[row[fresh], filled[row[fresh]]] = item[fresh]
        filled[row[fresh]] += 1


def _complete(
    slate: IntArray, filled: IntArray, log_probs: LogProbs, rng: np.random.Generator
) -> None:
    """Fill slates whose items hold nearly all mass, by scores of all the other items."""
    size = slate.shape[1]
    for row in np.flatnonzero(filled < size):
        rest = log_probs(np.array([row]))
        rest[:, slate[row, : filled[row]]] = -np.inf
        slate[row, filled[row] :] = draw_slates(rest, size - filled[row], rng)[0]


def _conditional(shown: Array, slate: IntArray, log_probs: LogProbs) -> Array:
    """(n, K) conditional log-probabilities of slates with single-draw ones `shown` (n, K)."""
    above = np.cumsum(np.exp(shown), axis=1)
    close: NDArray[np.bool_] = 1.0 - above[:, -1] < _LEAST_LEFT
    left = 1.0 - np.concatenate([np.zeros((len(slate), 1)), above[:, :-1]], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = shown - np.log(left)
    for row in np.flatnonzero(close):
        found[row] = conditional_log_prob(log_probs(np.array([row])), slate[[row]])[0]
    return found
