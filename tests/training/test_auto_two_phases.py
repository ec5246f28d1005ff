"""Two-phase sampling of held-out rows: probabilities, estimates, and promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from offtower.training.auto.choice import Tolerance, choose
from offtower.training.auto.estimates import mean_error
from offtower.training.auto.held_out import CandidatePolicy, HeldOutRows, HeldOutTerms
from offtower.training.auto.row_sampling import (
    ItemSample,
    RowOrder,
    row_sizes,
    squared_contribution,
)
from tests.training.test_auto_thinning import SCALES, RareRewards, taken, thinned


def drawn(rows: HeldOutRows, number: int, seed: int, noise: float = 0.5) -> HeldOutRows:
    """A second phase after a first one whose weights and predictions have log-normal errors."""
    rng = np.random.default_rng([seed, 1])
    n = len(rows.reward)
    squares = [
        squared_contribution(
            HeldOutTerms(
                one.weight * np.exp(noise * rng.standard_normal(n)),
                one.expected_reward * np.exp(noise * rng.standard_normal(n)),
            ),
            rows.reward - rows.action_reward,
        )
        for one in rows.terms.values()
    ]
    order = RowOrder.of(row_sizes(np.stack(squares, axis=1), rows.reward > 0.0), np.arange(n), seed)
    index = order.order[:number]
    return taken(rows, index, order.count(order.size[index], number))


def test_rows_are_drawn_with_the_stated_probabilities() -> None:
    """Sums over 400 orders within 4.5 standard errors: a false alarm once in 147,000 seeds for each
    of 3 sums."""
    rng = np.random.default_rng(0)
    size = rng.pareto(1.2, 500) + 0.01
    size /= size.sum()
    values = np.stack([np.ones(500), size, np.square(rng.standard_normal(500))], axis=1)
    sums = []
    for seed in range(400):
        order = RowOrder.of(size, np.arange(500), seed)
        index = order.order[:60]
        sums.append(order.count(size[index], 60) @ values[index])
    found = np.array(sums)
    error = found.std(axis=0, ddof=1) / 20.0
    assert (np.abs(found.mean(axis=0) - values.sum(axis=0)) < 4.5 * error + 1e-12).all()
    np.testing.assert_array_equal(order.count(size, 500), np.ones(500))
    # A longer sample has the shorter one's rows, which then stand for fewer.
    longer = order.count(size[order.order[:60]], 120)
    assert (longer <= order.count(size[order.order[:60]], 60)).all() and longer.min() == 1.0


def test_sizes_of_one_policy_are_proportional_to_contributions() -> None:
    square = np.square(np.array([[1.0], [2.0], [3.0], [6.0]]))
    found = row_sizes(square, np.array([False, False, True, True]))
    uniform = 0.25 / 4.0
    assert found == pytest.approx(0.75 * np.array([1, 2, 3, 6]) / 12.0 + uniform)
    few = row_sizes(np.zeros((4, 1)), np.array([False, False, False, True]))
    assert few == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert row_sizes(np.ones((3, 2)), np.zeros(3, dtype=bool)) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("whole", [True, False])
def test_log_probs_by_a_sample_of_items(whole: bool) -> None:
    """The logged item counts once, whether it is in the sample or not."""
    rng = np.random.default_rng(1)
    logit = rng.standard_normal(30) * 3.0
    sample = ItemSample.of(rng.integers(0, 10, 200), 30, 30 if whole else 12, seed=0)
    item, weight = sample.item.numpy(), sample.weight.numpy()
    assert weight.sum() == pytest.approx(30.0) and len(np.unique(item)) == len(item)
    scales = np.array([0.5, 4.0])
    for action in range(30):
        others = item != action
        sums = (weight[others] * np.exp(scales[:, None] * logit[item[others]])).sum(axis=1)
        wanted = scales * logit[action] - np.log(sums + np.exp(scales * logit[action]))
        # As if the logged item stood for as many as its weight says.
        share = (weight * np.exp(scales[:, None] * logit[item])).sum(axis=1)
        given = torch.from_numpy(scales * logit[action] - np.log(share))[:, None]
        found = sample.log_prob(given, torch.tensor([action]))[:, 0].numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def contribution(rows: HeldOutRows, policy: CandidatePolicy) -> np.ndarray:
    one = rows.terms[policy]
    return one.weight * (rows.reward - rows.action_reward) + one.expected_reward


@pytest.mark.parametrize("clustered", [False, True])
def test_drawn_rows_estimate_what_all_rows_do(clustered: bool) -> None:
    """120 samples of the same rows. Means of estimates, and of squared errors, within 4.5 standard
    errors of those of all rows: a false alarm below 1e-4 for all of them together."""
    rows = RareRewards(2, 6000).rows
    if clustered:
        rows = replace(rows, unit=np.arange(6000) // 3)
    samples = [drawn(rows, 600, seed) for seed in range(120)]
    for policy in rows.terms:
        whole = contribution(rows, policy)
        found = np.array([one.mean(contribution(one, policy)) for one in samples])
        spread = found.std(ddof=1)
        # The mean of ratios has a bias of the order of the variance.
        assert abs(found.mean() - whole.mean()) < 4.5 * spread / 120**0.5 + spread**2
        every = mean_error(whole, rows) ** 2
        errors = np.array([mean_error(contribution(one, policy), one) ** 2 for one in samples])
        margin = 4.5 * np.hypot((2.0 / 119) ** 0.5 * spread**2, errors.std() / 120**0.5)
        assert abs(errors.mean() - every - spread**2) < margin + 0.02 * every
    # Of the sharpest policy 600 drawn rows are nearly as good as all 6,000, and better than all
    # rewarded ones and a uniform sample of the others, which are as many.
    equal = [thinned(rows, 10, seed) for seed in range(40)]
    uniform = np.mean([mean_error(contribution(one, policy), one) ** 2 for one in equal])
    assert errors.mean() < 1.5 * every
    assert errors.mean() < 0.8 * uniform


def test_promises_of_drawn_rows_hold_at_rare_rewards() -> None:
    """At confidence .95, P(more than 11 of 60 promises above the truth) is below 1e-4. So few rows
    decide as often as all of them do."""
    exceeded = 0
    decided = np.zeros(2, dtype=int)
    for seed in range(60):
        world = RareRewards(seed, 5000)
        found = choose(drawn(world.rows, 400, seed), ["model"], tolerance=Tolerance(0.005))
        softer = (one for one in SCALES if one <= found.chosen.inverse_temperature)
        exceeded += found.low > max(map(world.value, softer))
        every = choose(world.rows, ["model"], tolerance=Tolerance(0.005))
        decided += [not found.keep_logging, not every.keep_logging]
    assert exceeded <= 11
    assert decided[0] >= 0.75 * decided[1] > 20
