"""Draws with propensities against enumeration: exact softmax, unbiasedness, slates, filters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from offtower.errors import ConfigError, DataError
from offtower.retrieval.cell_sampling import sample_with_replacement
from offtower.retrieval.cells import Cells
from offtower.retrieval.partitioning import build_cells
from offtower.retrieval.propensity_sampler import PropensitySampler

ALPHA = 1e-4
"""False-alarm rate of each statistical assertion."""


def world(
    n: int, dim: int, scale: float, seed: int = 0, queries: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Clustered items with a bias coordinate, and queries whose logits have deviation ~scale."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, dim))
    items = centres[rng.integers(40, size=n)] + 0.5 * rng.standard_normal((n, dim))
    vectors = np.c_[items, 0.3 * rng.standard_normal(n)].astype(np.float32)
    u = np.c_[scale * rng.standard_normal((queries, dim)) / dim**0.5, np.ones(queries)]
    return vectors, u.astype(np.float32)


def softmax(cells: Cells, query: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """(N,) probabilities by item number, float64."""
    logit = np.empty(len(cells.item_of_row))
    logit[cells.item_of_row] = cells.vectors.astype(np.float64) @ query.astype(np.float64)
    if hidden is not None:
        logit[hidden] = -np.inf
    p = np.exp(logit - logit.max())
    return p / p.sum()


def test_cells_hold_every_item_once_with_its_moments() -> None:
    vectors, queries = world(5000, 6, 2.0)
    cells = build_cells(vectors, queries)
    assert np.array_equal(np.sort(cells.item_of_row), np.arange(5000))
    assert np.array_equal(cells.vectors[cells.row_of_item], vectors)
    for cell in (0, cells.num_cells // 2, cells.num_cells - 1):
        inside = cells.vectors[cells.start[cell] : cells.start[cell + 1]].astype(np.float64)
        np.testing.assert_allclose(cells.mean[cell], inside.mean(0), rtol=1e-5, atol=1e-6)
        logit = inside @ queries.T.astype(np.float64)
        # The expected variance of a logit over these queries.
        assert cells.logit_variance[cell] == pytest.approx(logit.var(axis=0).mean(), rel=0.05)


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_a_hundred_thousand_items_are_drawn_by_the_exact_softmax(scale: float) -> None:
    """1e6 draws from 250 choices of the rows that are scored: chi-square over the items, rare ones
    pooled, false-alarm rate ALPHA.

    Up to scale 2 at most 5 of the 250 errors of pscore exceed 1 %, five target errors. In 15 worlds
    none of 1,800 did; at a rate of .003, P(more than 5 of 250) is ALPHA. More peaked policies have
    contexts whose samples nearly always miss a heavy item; the coverage test averages over those.
    """
    vectors, queries = world(100_000, 8, scale)
    cells = build_cells(vectors, queries[:32])
    sampler = PropensitySampler(cells, relative_error=0.002)
    query = queries[40]
    truth = softmax(cells, query)
    rng = np.random.default_rng(1)
    counts = np.zeros(len(truth))
    inexact, share = 0, 0.0
    for _ in range(250):
        weights = sampler.weights(query, rng)
        share = max(share, weights.rows_scored / len(truth))
        # The distribution of one draw given the scored rows, enumerated; 4,000 draws from it.
        cell_of = np.repeat(np.arange(cells.num_cells), cells.size)
        exact = (cells.vectors @ query).astype(np.float64)
        inside = np.exp(exact - weights.shift)
        mass = np.add.reduceat(inside, cells.start[:-1])
        law = weights.weight[cell_of] / weights.weight.sum() * inside / mass[cell_of]
        drawn = cells.item_of_row[rng.choice(len(law), 4000, p=law / law.sum())]
        counts += np.bincount(drawn, minlength=len(truth))
        pick = sample_with_replacement(weights, rng, 5)
        inexact += bool(np.abs(pick.pscore / truth[pick.item] - 1.0).max() > 0.01)
        row = cells.row_of_item[pick.item]
        np.testing.assert_allclose(pick.conditional_pscore, law[row], rtol=1e-4)
    expected = 1e6 * truth
    order = np.argsort(expected)
    rare = order[expected[order] < 10]
    common = order[expected[order] >= 10]
    observed = np.append(counts[common], counts[rare].sum())
    wanted = np.append(expected[common], expected[rare].sum())
    keep = wanted > 0
    chi = float(np.sum((observed[keep] - wanted[keep]) ** 2 / wanted[keep]))
    assert stats.chi2.sf(chi, keep.sum() - 1) > ALPHA
    assert inexact <= 5 or scale > 2.0
    assert share < 1.0 or scale == 8.0


@pytest.mark.parametrize("mode", ["softmax", "cells", "exact"])
def test_inverse_propensities_are_unbiased_whatever_the_budget(mode: str) -> None:
    """E[sum over items of f(a) 1{A=a}/pscore] = sum f, at a budget so small that pscore is poor.

    1,000 draws in each of 3 worlds. Both means lie within 4 standard errors: false-alarm rate 6e-5
    each.
    """
    draws, ratios = [], {"pscore": [], "conditional_pscore": []}
    for seed in range(3):
        vectors, queries = world(20_000, 40, 1.5, seed=seed)
        cells = build_cells(vectors, queries[:32], num_cells=1024)
        sampler = PropensitySampler(cells, relative_error=0.9)
        # f near the policy: with heavier weights the mean of the draws is not normal.
        f = softmax(cells, queries[50]) * np.random.default_rng([3, seed]).random(20_000)
        rng = np.random.default_rng([7, seed])
        for _ in range(1000):
            drawn = sampler.draw(queries[50], rng, mode=mode)  # type: ignore[arg-type]
            draws.append(drawn)
            for name, ratio in ratios.items():
                ratio.append(f[drawn.item[0]] / getattr(drawn, name)[0] / f.sum())
    for name, ratio in ratios.items():
        z = (np.mean(ratio) - 1.0) / (np.std(ratio) / len(ratio) ** 0.5)
        assert abs(z) < 4.0, (name, z)
    if mode == "softmax":
        assert np.mean([d.relative_error[0] for d in draws]) > 0.003
        assert max(d.rows_scored for d in draws) < 8000


@pytest.mark.parametrize("scale", [0.3, 1.5, 6.0, 20.0])
def test_the_stated_error_covers_at_its_nominal_rate(scale: float) -> None:
    """Near-uniform to very peaked policies, 1 item in 500 far from all others; one draw for each of
    96 contexts in each of 8 worlds.

    One and two standard errors hold 68.3 % and 95.4 % of normal errors. A correct standard error
    fails each assertion with probability ALPHA (exact binomial; draws of one context each are
    independent given the world, and worlds differ by no more than chance: the deviation of 24
    worlds' rates was that of a binomial). Where a few items dominate, coverage is higher.
    """
    ratio = []
    for seed in range(8):
        vectors, queries = world(30_000, 8, scale, seed=seed, queries=128)
        rng = np.random.default_rng([2, seed])
        odd = rng.choice(30_000, 60, replace=False)
        vectors[odd, :8] += 1.5 * rng.standard_normal((60, 8)).astype(np.float32)
        cells = build_cells(vectors, queries[:32], seed=seed)
        sampler = PropensitySampler(cells)
        for query in queries[32:]:
            drawn = sampler.draw(query, rng)
            # A full scan states 0 and is exact.
            if drawn.relative_error[0] > 0.0:
                error = drawn.pscore[0] / softmax(cells, query)[drawn.item[0]] - 1.0
                ratio.append(abs(error) / drawn.relative_error[0])
    n = len(ratio)
    assert n > 600, n
    for errors, rate in ((1.0, 0.683), (2.0, 0.954)):
        inside = int(np.sum(np.asarray(ratio) <= errors))
        assert inside >= stats.binom.ppf(ALPHA, n, rate), (errors, inside / n)
    if scale <= 1.5:
        assert np.mean(np.asarray(ratio) <= 1.0) < 0.683 + 0.095


def test_cell_draws_have_the_stated_distribution() -> None:
    """Mode `cells`: stated probabilities against 60,000 draws by chi-square, false-alarm rate
    ALPHA."""
    vectors, queries = world(300, 4, 2.0)
    cells = build_cells(vectors, queries[:32], num_cells=16)
    sampler = PropensitySampler(cells)
    rng = np.random.default_rng(5)
    drawn = sampler.draw(queries[40], rng, size=60_000, mode="cells")
    probability = np.zeros(300)
    probability[drawn.item] = drawn.pscore
    assert (drawn.relative_error == 0).all()
    seen = np.bincount(drawn.item, minlength=300)
    # Items never drawn are rare: what was drawn has nearly all of the probability.
    assert 0.98 < probability.sum() < 1.0 + 1e-6
    common = probability * 60_000 >= 10
    chi = np.sum((seen - 60_000 * probability)[common] ** 2 / (60_000 * probability[common]))
    assert stats.chi2.sf(chi, common.sum() - 1) > ALPHA


@pytest.mark.parametrize("mode", ["softmax", "cells", "exact"])
def test_slates_have_conditional_propensities(mode: str) -> None:
    """3,000 items are all scored, so nothing is random but the slates themselves."""
    vectors, queries = world(3000, 6, 3.0)
    cells = build_cells(vectors, queries[:32], num_cells=128)
    sampler = PropensitySampler(cells, relative_error=0.002)
    rng = np.random.default_rng(9)
    for query in queries[40:50]:
        slate = sampler.slate(query, rng, size=12, mode=mode)  # type: ignore[arg-type]
        assert len(set(slate.item)) == 12
        if mode == "cells":
            continue
        for position in range(12):
            truth = softmax(cells, query, slate.item[:position])
            error = slate.pscore[position] / truth[slate.item[position]] - 1.0
            assert abs(error) < 1e-4


@pytest.mark.parametrize("mode", ["softmax", "cells"])
def test_products_of_a_slates_propensities_are_unbiased(mode: str) -> None:
    """E[f(a, b) / (p_1 p_2)] = sum over ordered pairs of f, though p_1 and p_2 share their rows.
    The mean lies within 4 standard errors: false-alarm rate 6e-5."""
    vectors, queries = world(12_000, 5, 1.2)
    cells = build_cells(vectors, queries[:32], num_cells=1024)
    sampler = PropensitySampler(cells, relative_error=0.9)
    query = queries[45]
    p = softmax(cells, query)
    rng = np.random.default_rng(11)
    g = np.random.default_rng(12).random(12_000)
    # f = p_a g_a p_b g_b keeps the weights' variance small.
    h = p * g
    truth = h.sum() ** 2 - np.square(h).sum()
    value = []
    for _ in range(3000):
        slate = sampler.slate(query, rng, size=2, mode=mode)  # type: ignore[arg-type]
        a, b = slate.item
        value.append(h[a] * h[b] / np.prod(slate.pscore))
        scored = slate.rows_scored
    assert scored < 6000
    z = (np.mean(value) - truth) / (np.std(value) / len(value) ** 0.5)
    assert abs(z) < 4.0


@pytest.mark.parametrize("mode", ["softmax", "cells", "exact"])
def test_filters_renormalize_the_policy(mode: str) -> None:
    """4,000 items are all scored, so propensities are exact up to rounding."""
    vectors, queries = world(4000, 6, 2.0)
    cells = build_cells(vectors, queries[:32])
    sampler = PropensitySampler(cells, relative_error=0.002)
    query = queries[40]
    best = np.argsort(-softmax(cells, query))[:500]
    rng = np.random.default_rng(4)
    drawn = sampler.draw(query, rng, size=300, mode=mode, exclude=best)  # type: ignore[arg-type]
    assert not np.isin(drawn.item, best).any()
    if mode != "cells":
        truth = softmax(cells, query, best)
        np.testing.assert_allclose(drawn.pscore, truth[drawn.item], rtol=1e-4)
    few = np.setdiff1d(np.arange(4000), [5, 17, 900])
    last = sampler.slate(query, rng, size=3, mode=mode, exclude=few)  # type: ignore[arg-type]
    assert set(last.item) == {5, 17, 900}
    assert last.pscore[-1] == pytest.approx(1.0)


def test_a_slate_is_complete_when_remaining_probabilities_underflow() -> None:
    """One item holds all of the mass to double precision; the second position is still right."""
    vectors, queries = world(2000, 4, 1.0)
    vectors[7, -1] = 900.0
    cells = build_cells(vectors, queries[:32])
    sampler = PropensitySampler(cells)
    slate = sampler.slate(queries[40], np.random.default_rng(0), size=3)
    assert slate.item[0] == 7 and slate.pscore[0] == pytest.approx(1.0)
    truth = softmax(cells, queries[40], np.asarray([7]))
    assert slate.pscore[1] == pytest.approx(truth[slate.item[1]], rel=1e-3)


def test_invalid_arguments_raise() -> None:
    vectors, queries = world(200, 4, 1.0)
    sampler = PropensitySampler(build_cells(vectors, queries))
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="finite"):
        sampler.draw(np.full(5, np.nan, dtype=np.float32), rng)
    with pytest.raises(DataError, match="filters leave 0 of 200"):
        sampler.slate(queries[0], rng, size=2, exclude=np.arange(200))
    one_left = sampler.slate(queries[0], rng, size=2, exclude=np.arange(199))
    assert one_left.item.tolist() == [199] and one_left.pscore.tolist() == [1.0]
    with pytest.raises(ConfigError, match="mode must be one of"):
        sampler.draw(queries[0], rng, mode="greedy")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="must lie in"):
        sampler.draw(queries[0], rng, exclude=np.asarray([200]))
    with pytest.raises(ConfigError, match="relative_error"):
        PropensitySampler(sampler.cells, relative_error=0.0)


def test_equal_items_and_tiny_catalogues() -> None:
    for n in (1, 2, 40):
        cells = build_cells(np.ones((n, 3), dtype=np.float32), np.ones((4, 3), dtype=np.float32))
        drawn = PropensitySampler(cells).draw(
            np.ones(3, dtype=np.float32), np.random.default_rng(0), size=50
        )
        np.testing.assert_allclose(drawn.pscore, 1.0 / n, rtol=1e-6)
