"""The base measure of `auto` against the frequencies of simulated logging policies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from offtower.training.auto.base_measure import log_base_measure

ITEMS, ROWS = 400, 3000


def logged(dependence: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions and propensities of rows, and the frequencies of items over all contexts."""
    rng = np.random.default_rng(seed)
    popularity = 1.5 * rng.standard_normal(ITEMS)
    context, item = rng.standard_normal((ROWS, 4)), dependence * rng.standard_normal((ITEMS, 4))
    pi = softmax(popularity + context @ item.T, axis=1)
    action = (pi.cumsum(axis=1) < rng.random((ROWS, 1))).sum(axis=1).clip(max=ITEMS - 1)
    many = softmax(popularity + rng.standard_normal((4000, 4)) @ item.T, axis=1)
    return action, pi[np.arange(ROWS), action], many.mean(axis=0)


def divergence(true: np.ndarray, log_base: np.ndarray) -> float:
    return float(true @ (np.log(true) - log_base + np.log(np.exp(log_base).sum())))


@pytest.mark.parametrize("seed", range(3))
def test_it_is_exact_where_propensities_do_not_depend_on_the_context(seed: int) -> None:
    action, pscore, true = logged(0.0, seed)
    base = np.exp(log_base_measure(action, pscore, ITEMS))
    seen = np.unique(action)
    assert len(seen) < ITEMS
    np.testing.assert_allclose(base[seen], true[seen], rtol=1e-6)
    assert base.sum() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("dependence", [0.0, 0.3, 2.0])
def test_it_is_no_farther_from_the_truth_than_frequencies_are(dependence: float) -> None:
    """Divergence from the true frequencies; those of rows with the mass of Good and Turing."""
    found, frequencies = [], []
    for seed in range(4):
        action, pscore, true = logged(dependence, seed)
        found.append(divergence(true, log_base_measure(action, pscore, ITEMS)))
        count = np.bincount(action, minlength=ITEMS).astype(float)
        count[count == 0.0] = max((count == 1.0).sum() / max((count == 0.0).sum(), 1), 1e-2)
        frequencies.append(divergence(true, np.log(count / count.sum())))
    # With contexts that decide alone, propensities are of no use, and do no harm.
    assert np.mean(found) < (0.7 if dependence < 1.0 else 1.05) * np.mean(frequencies)


def test_logs_with_one_item_or_all_items() -> None:
    base = np.exp(log_base_measure(np.zeros(5, np.int64), np.full(5, 0.9), 3))
    np.testing.assert_allclose(base, [0.9, 0.05, 0.05], rtol=1e-6)
    base = np.exp(log_base_measure(np.arange(4), np.full(4, 0.25), 4))
    np.testing.assert_allclose(base, 0.25)
    # A deterministic log leaves nothing; items without rows keep a little.
    base = np.exp(log_base_measure(np.zeros(5, np.int64), np.ones(5), 3))
    assert base[0] > 0.99 and (base[1:] > 0.0).all()
