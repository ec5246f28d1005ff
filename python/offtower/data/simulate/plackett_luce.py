"""Plackett-Luce slates in float64, by arrays over all items.

A slate is drawn without replacement from the single-draw distribution p of its row:

    pi(a_k | x, a_1..a_{k-1}) = p(a_k) / (1 - sum_{j<k} p(a_j))

These are the simulators' own formulas, written without the code of serving and evaluation that is
tested against them.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from offtower.errors import DataError

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

LOGITS = 1 << 22
"""Numbers in an array of rows x items; longer work is done in tiles of rows."""


def tile_rows(n_items: int) -> int:
    """Rows of a tile."""
    return max(1, LOGITS // n_items)


def draw_slates(log_prob: Array, size: int, rng: np.random.Generator) -> IntArray:
    """Draw a slate for each row, by the Gumbel top-k trick (Kool et al. 2019).

    Args:
        log_prob: (B, N) single-draw log-probabilities; -inf where an item may not be shown.
        size: K.
        rng: source of the draws.

    Returns:
        (B, K) item numbers, first position first.

    Raises:
        DataError: a row has fewer than K items of positive probability.
    """
    few = np.isfinite(log_prob).sum(axis=1) < size
    if few.any():
        raise DataError(
            f"row {int(few.argmax())} has fewer than {size} items that may be shown; ask for "
            "smaller slates, or for more eligible items"
        )
    key = log_prob - np.log(rng.standard_exponential(log_prob.shape))
    chosen = np.argpartition(-key, size - 1, axis=1)[:, :size]
    order = np.argsort(-np.take_along_axis(key, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def conditional_log_prob(log_prob: Array, slate: IntArray) -> Array:
    """Compute (B, K) log pi(a_k | x, a_<k) of one slate a row.

    The mass left at each position is a sum of positive numbers, so it is exact also where the
    items above hold nearly all of it.
    """
    shown = np.take_along_axis(log_prob, slate, axis=1)
    rest = log_prob.copy()
    np.put_along_axis(rest, slate, -np.inf, axis=1)
    top = rest.max(axis=1)
    base = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        left = base + np.log(np.exp(rest - base[:, None]).sum(axis=1))
        total = np.logaddexp.accumulate(
            np.concatenate([left[:, None], shown[:, ::-1]], axis=1), axis=1
        )
    conditional: Array = np.minimum(shown - total[:, :0:-1], 0.0)
    return conditional


def all_slates(n_items: int, size: int) -> IntArray:
    """List all (S, K) slates of distinct items: N (N-1) ... (N-K+1) of them."""
    return np.array(list(itertools.permutations(range(n_items), size)), dtype=np.int64)


def slate_probabilities(log_prob: Array, slates: IntArray) -> Array:
    """Compute the probability of each slate in each row.

    Args:
        log_prob: (B, N).
        slates: (S, K), the same for all rows.

    Returns:
        (B, S); 0 for slates with an item that may not be shown.
    """
    rows, count = len(log_prob), len(slates)
    spread = np.repeat(log_prob, count, axis=0)
    shown = np.tile(slates, (rows, 1))
    possible = np.isfinite(np.take_along_axis(spread, shown, axis=1)).all(axis=1)
    found = np.zeros(rows * count)
    found[possible] = np.exp(conditional_log_prob(spread[possible], shown[possible]).sum(axis=1))
    return found.reshape(rows, count)
