"""Proposals draw what their log Q says, whoever draws and whenever."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from offtower.data import Catalogue, LogSchema
from offtower.data.log import TableLog
from offtower.errors import ConfigError
from offtower.ops import policy_terms, sampled_policy_terms
from offtower.sampling import AliasTable, ItemCounts, count_items, make_proposal
from offtower.sampling.draw_sources import UniformSource

N, ROWS = 40, 500
ALPHA = 1e-5
"""False alarms of each chi-square test."""


def logged(seed: int = 0) -> np.ndarray:
    """Actions of a log: skewed, and items 30 and more are never logged."""
    weight = np.arange(1, 31) ** -0.8
    rng = np.random.default_rng(seed)
    return rng.choice(30, size=ROWS, p=weight / weight.sum())


def chi_square(count: np.ndarray, expected: np.ndarray) -> None:
    assert count[expected == 0].sum() == 0
    cells = expected > 0
    assert expected[cells].min() > 5
    statistic = ((count[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    assert statistic < chi2.ppf(1 - ALPHA, cells.sum() - 1), statistic


@pytest.mark.parametrize("name", ["uniform", "frequency", "in_batch", "mixed"])
def test_draws_have_the_stated_probabilities(name: str) -> None:
    """One draw of each step, at a random place, is an independent draw of Q: chi-square against
    log_prob. For in-batch rows the place is not the row's own, and rows are drawn independently."""
    actions = logged()
    proposal = make_proposal(name, N, num_samples=12, counts=ItemCounts.of(actions))
    rng = np.random.default_rng(5)
    steps, batch = 20_000, 9
    size = proposal.size(batch)
    count = np.zeros(N)
    for step in range(steps):
        rows = torch.from_numpy(actions[rng.integers(ROWS, size=batch)])
        item = proposal.draw(step, rows).item.numpy()
        assert item.shape == (size,)
        # The row that the estimate is for is row 0; batch rows come first.
        own = name in ("in_batch", "mixed")
        count[item[rng.integers(1 if own else 0, size)]] += 1
    probability = np.exp(proposal.log_prob(np.arange(N), batch))
    # Q is per draw that is not the row's own, m Q its expected number.
    expected = probability / probability.sum() * steps
    if name == "mixed":
        actions_share = np.bincount(actions, minlength=N) / ROWS
        wanted = (8 * actions_share + 12 / N) / 21
        np.testing.assert_allclose(probability, wanted, rtol=1e-12)
    if name == "in_batch":
        assert probability.sum() == pytest.approx(8 / 9)
    if name in ("uniform", "frequency"):
        assert probability.sum() == pytest.approx(1.0)
        assert probability.min() >= 0.25 * (1 if name == "frequency" else 4) / N * 0.999
    chi_square(count, expected)


def test_the_distribution_test_detects_a_wrong_probability() -> None:
    """The test above has power: log Q of a smoothing of 0.6 instead of 0.75 passes it with a
    probability of 6e-8 (non-central chi-square)."""
    actions = logged()
    drawn = make_proposal("frequency", N, num_samples=12, counts=ItemCounts.of(actions))
    other = make_proposal("frequency", N, num_samples=12, counts=ItemCounts.of(actions), power=0.6)
    rng = np.random.default_rng(5)
    count = np.zeros(N)
    for step in range(20_000):
        item = drawn.draw(step, torch.zeros(1, dtype=torch.int64)).item.numpy()
        count[item[rng.integers(12)]] += 1
    with pytest.raises(AssertionError):
        chi_square(count, np.exp(other.log_prob(np.arange(N), 1)) * 20_000)


@pytest.mark.parametrize("name", ["uniform", "frequency", "in_batch", "mixed"])
def test_the_estimated_normalizer_is_unbiased(name: str) -> None:
    """Through the operator, for a context whose own row is in the batch: Z^ averages to Z (over
    what the proposal can draw), within 4.5 standard errors (false-alarm rate 7e-6 each). A batch of
    4 shows a count of B instead of B - 1 as a bias of a fifth, eight standard errors."""
    actions = logged(1)
    proposal = make_proposal(name, N, num_samples=6, counts=ItemCounts.of(actions))
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    v = torch.randn(N, 3, generator=generator, dtype=torch.float64) * 0.5
    action = torch.tensor([2])
    reachable = np.exp(proposal.log_prob(np.arange(N), 4)) > 0
    reachable[2] = True
    z = torch.logsumexp((u @ v.T)[0, torch.from_numpy(reachable)], 0)
    rng = np.random.default_rng(3)
    ratios = []
    for step in range(1600):
        others = torch.from_numpy(actions[rng.integers(ROWS, size=3)])
        draws = proposal.draw(step, torch.cat([action, others]))
        terms = sampled_policy_terms(
            u, v[action], action, v[draws.item], draws.item, draws.log_proposal
        )
        ratios.append(math.exp(float(terms.log_normalizer) - float(z)))
    error = np.std(ratios) / math.sqrt(len(ratios))
    assert abs(np.mean(ratios) - 1) < 4.5 * error
    assert error < 0.025


def test_rows_without_replacement_keep_the_expectation() -> None:
    """Batches of an epoch are a permutation, cut: (B - 1) f(a) n / (n - 1) other rows show a. Each
    of 40 items within 5 standard errors: false-alarm rate 2e-5 in all."""
    actions = logged(2)[:60]
    counts = ItemCounts.of(actions)
    source = make_proposal("in_batch", N, num_samples=1, counts=counts).sources[0]
    rng = np.random.default_rng(0)
    total, times = np.zeros(N), 30_000
    for _ in range(times):
        batch = rng.permutation(60)[:5]
        if 0 not in batch:
            batch[0] = 0
        total += np.bincount(actions[batch[batch != 0]], minlength=N)
    expected = source.expected_count(np.arange(N), 5) * 60 / 59
    expected[actions[0]] -= 4 / 59  # the row itself, which is not among the others
    error = np.sqrt(np.maximum(expected, 1e-9) / times)
    # 4 of the 5 places are other rows, in both cases.
    assert bool((np.abs(total / times - expected) < 5 * error + 1e-12).all())


@given(
    st.lists(
        st.one_of(st.just(0.0), st.floats(1e-9, 1e9), st.integers(1, 5).map(float)),
        min_size=1,
        max_size=60,
    ).filter(lambda x: sum(x) > 0)
)
@settings(max_examples=300)
def test_alias_tables_hold_their_distribution(weights: list[float]) -> None:
    weight = np.array(weights)
    table = AliasTable(weight)
    np.testing.assert_allclose(table.probabilities(), weight / weight.sum(), atol=1e-12)
    assert bool((table.probabilities()[weight == 0] < 1e-12).all())


def test_a_large_alias_table_and_its_draws() -> None:
    """The five heaviest items within 4.5 standard errors: false-alarm rate 4e-5 in all."""
    weight = np.random.default_rng(0).pareto(0.5, 1_000_000)
    table = AliasTable(weight)
    p = weight / weight.sum()
    np.testing.assert_allclose(table.probabilities(), p, atol=1e-10)
    uniform = np.random.default_rng(1).random((400_000, 2))
    heaviest = np.argsort(weight)[-5:]
    drawn = np.bincount(table.draw(uniform), minlength=1_000_000)[heaviest]
    expected = p[heaviest] * 400_000
    assert bool((np.abs(drawn - expected) < 4.5 * np.sqrt(expected)).all())


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
@settings(max_examples=100)
def test_uniform_draws_spread_over_the_catalogue(items: int, samples: int, seed: int) -> None:
    """Each m-th of the catalogue gives one: an item is drawn at most once more than its share."""
    source = UniformSource(items, samples)
    drawn = source.draw(np.random.Philox(seed), np.zeros(0, dtype=np.int64))
    assert drawn.min() >= 0 and drawn.max() < items
    count = np.bincount(drawn, minlength=items)
    assert count.max() <= math.ceil(samples / items) + 1
    if samples % items == 0:
        # Strata do not straddle items: the exact operator.
        assert bool((count == samples // items).all())


def test_a_whole_catalogue_of_uniform_draws_is_exact() -> None:
    u, v = torch.randn(5, 3).double(), torch.randn(N, 3).double()
    action = torch.arange(5)
    draws = make_proposal("uniform", N, num_samples=2 * N).draw(7, action)
    got = sampled_policy_terms(u, v[action], action, v[draws.item], draws.item, draws.log_proposal)
    torch.testing.assert_close(got.log_prob, policy_terms(u, v, action).log_prob)


@pytest.mark.parametrize("name", ["uniform", "frequency", "in_batch", "mixed"])
def test_draws_are_a_function_of_the_seed_alone(name: str) -> None:
    """Two workers' proposals, used in another order, draw the same."""
    counts = ItemCounts.of(logged())
    one, two = (make_proposal(name, N, num_samples=20, counts=counts) for _ in range(2))
    action = torch.arange(8)
    first = {seed: one.draw(seed, action) for seed in (1, 2, 3)}
    for seed in (3, 1, 2):
        again = two.draw(seed, action)
        assert torch.equal(again.item, first[seed].item)
        assert torch.equal(again.log_proposal, first[seed].log_proposal)
    if name != "in_batch":
        assert not torch.equal(first[1].item, first[2].item)


def test_counts_of_a_log() -> None:
    ids = np.array(["a", "b", "c", "d"])
    actions = np.random.default_rng(0).choice(3, size=1000, p=[0.7, 0.2, 0.1])
    table = pa.table({"action": ids[actions], "reward": np.zeros(1000), "x": np.zeros(1000)})
    catalogue = Catalogue.from_arrays(ids, {})
    schema = {"context": [{"name": "x", "kind": "numeric"}], "pscore": None}
    log = TableLog(table, LogSchema.from_dict(schema), 77)
    counts = count_items(log, catalogue)
    assert counts.item.tolist() == [0, 1, 2]
    assert counts.count.tolist() == np.bincount(actions).tolist()
    assert counts.share(np.array([3, 0])).tolist() == [0.0, counts.count[0] / 1000]
    halves = [ItemCounts.of(actions[:300]), ItemCounts.of(actions[300:])]
    merged = halves[0].merge(halves[1])
    assert merged.count.tolist() == counts.count.tolist()


def test_counts_of_a_part_of_the_catalogue() -> None:
    """Items of other workers are counted together, so shares are those of the whole log."""
    actions = logged()
    ids = pa.array([f"item {number}" for number in range(N)])
    table = pa.table({"action": ids.take(pa.array(actions)), "reward": np.zeros(len(actions))})
    schema = LogSchema.from_dict({"context": [], "pscore": None})
    log, catalogue = TableLog(table, schema, 13), Catalogue.from_arrays(np.array(ids), {})
    whole = count_items(log, catalogue)
    for start, stop in ((0, 2), (2, N), (0, N), (3, 3)):
        part = count_items(log, catalogue, within=(start, stop))
        inside = (whole.item >= start) & (whole.item < stop)
        assert part.item.tolist() == whole.item[inside].tolist()
        assert part.rows == whole.rows == len(actions)
        every = np.arange(start, stop)
        assert part.share(every).tolist() == whole.share(every).tolist()


@pytest.mark.parametrize("name", ["uniform", "frequency", "in_batch", "mixed"])
def test_draws_of_parts_are_those_of_the_whole(name: str) -> None:
    """Workers that keep the draws of their items have all of them, with the same log counts."""
    counts = ItemCounts.of(logged())
    proposal = make_proposal(name, N, num_samples=20, counts=counts)
    action = torch.from_numpy(logged()[:8])
    whole = proposal.draw(3, action)
    found = []
    for start, stop in ((0, 1), (1, 1), (1, 4), (4, N)):
        part = proposal.draw(3, action, within=(start, stop))
        assert part.total == whole.total == len(whole.item)
        assert bool(((part.item >= start) & (part.item < stop)).all())
        found += list(zip(part.item.tolist(), part.log_count.tolist(), strict=True))
    assert sorted(found) == sorted(zip(whole.item.tolist(), whole.log_count.tolist(), strict=True))


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ConfigError, match="unknown proposal 'mixd'; known: uniform"):
        make_proposal("mixd", N, num_samples=3)
    with pytest.raises(ConfigError, match="'mixed' needs the counts"):
        make_proposal("mixed", N, num_samples=3)
    with pytest.raises(ConfigError, match="needs a PolicyTopK"):
        make_proposal("top_k", N, num_samples=3)
