"""Held-out rows that stand for several rows of the log, and bounds at rare rewards."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from offtower.training.auto.choice import Tolerance, choose
from offtower.training.auto.estimates import (
    CandidateEstimate,
    Levels,
    estimate_policies,
    mean_error,
    whole_error,
)
from offtower.training.auto.held_out import CandidatePolicy, HeldOutRows, HeldOutTerms
from offtower.training.auto.serving import Requirement, propose_serving

ITEMS = 50
LEVELS = Levels(min_reward=0.0, confidence=0.95, gain_confidence=0.99)
SCALES = (1.0, 2.0, 4.0, 8.0)


def softmax(scores: np.ndarray) -> np.ndarray:
    weight = np.exp(scores - scores.max())
    return weight / weight.sum()


class RareRewards:
    """One context, 50 items, about 1 % of the rows rewarded, and a popular half of the items."""

    def __init__(self, seed: int, n: int = 20_000) -> None:
        rng = np.random.default_rng(seed)
        self.scores = rng.standard_normal(ITEMS)
        self.expected = np.minimum(0.3, 0.004 * np.exp(1.2 * self.scores))
        self.logging = softmax(rng.standard_normal(ITEMS))
        predicted = np.minimum(0.9, 1.3 * self.expected)
        action = rng.choice(ITEMS, n, p=self.logging)
        terms = {}
        for s in SCALES:
            policy = softmax(s * self.scores)
            terms[CandidatePolicy("model", s)] = HeldOutTerms(
                policy[action] / self.logging[action], np.full(n, policy @ predicted)
            )
        self.rows = HeldOutRows(
            reward=(rng.random(n) < self.expected[action]).astype(float),
            terms=terms,
            action_reward=predicted[action],
            scale={"model": 1.0},
            loss={"model": 0.1},
            unit=None,
            pscore=self.logging[action],
            eligible_items=np.full(n, float(ITEMS)),
        )

    def value(self, inverse_temperature: float) -> float:
        return float(softmax(inverse_temperature * self.scores) @ self.expected)


def taken(rows: HeldOutRows, index: np.ndarray, count: np.ndarray | None) -> HeldOutRows:
    return replace(
        rows,
        reward=rows.reward[index],
        terms={
            policy: HeldOutTerms(one.weight[index], one.expected_reward[index])
            for policy, one in rows.terms.items()
        },
        action_reward=rows.action_reward[index],
        unit=None if rows.unit is None else rows.unit[index],
        pscore=rows.pscore[index],
        eligible_items=rows.eligible_items[index],
        count=count,
    )


def thinned(rows: HeldOutRows, thinning: int, seed: int) -> HeldOutRows:
    """All rewarded rows, and one in `thinning` others."""
    drawn = np.random.default_rng(seed).random(len(rows.reward)) < 1.0 / thinning
    index = np.flatnonzero((rows.reward > 0.0) | drawn)
    return taken(rows, index, np.where(rows.reward[index] > 0.0, 1.0, float(thinning)))


def numbers(estimate: CandidateEstimate) -> dict[str, float]:
    names = [one.name for one in fields(estimate)]
    return {n: getattr(estimate, n) for n in names if isinstance(getattr(estimate, n), float)}


def test_a_count_of_one_changes_nothing() -> None:
    rows = RareRewards(0, 3000).rows
    once = replace(rows, count=np.ones(3000))
    assert rows.effective_size(once.reward) == once.effective_size(rows.reward) == 3000.0
    found = [estimate_policies(one, list(rows.terms), LEVELS) for one in (rows, once)]
    for one, other in zip(*found, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-9, abs=1e-12)
    needed = Requirement(3000, 100.0, 0.95)
    one, other = (
        propose_serving(choose(given, ["model"]), given, needed).sharpest for given in (rows, once)
    )
    assert one.gain_error == pytest.approx(other.gain_error, rel=1e-9)
    assert one.effective_sample_size == pytest.approx(other.effective_sample_size, rel=1e-9)


def test_counted_rows_are_repeated_rows_of_one_unit() -> None:
    rows = RareRewards(1, 2000).rows
    few = thinned(rows, 4, seed=5)
    assert few.count is not None
    index = np.repeat(np.arange(len(few.reward)), few.count.astype(int))
    repeated = replace(taken(few, index, None), unit=index)
    assert few.size == len(repeated.reward)
    assert few.inverse_pscore == pytest.approx(repeated.inverse_pscore, rel=1e-12)
    for policy, terms in few.terms.items():
        again = repeated.terms[policy].weight
        assert few.mean(terms.weight) == pytest.approx(again.mean(), rel=1e-12)
        assert mean_error(terms.weight, few) == pytest.approx(
            mean_error(again, repeated), rel=1e-12
        )


@pytest.mark.parametrize("clustered", [False, True])
def test_thinned_rows_estimate_what_all_rows_do(clustered: bool) -> None:
    """300 thinnings of the same rows. Means of estimates, and of squared errors, within 4.5
    standard errors of those of all rows: a false alarm below 1e-4 for all of them together."""
    rows = RareRewards(2, 6000).rows
    if clustered:
        rows = replace(rows, unit=np.arange(6000) // 3)
    samples = [thinned(rows, 10, seed) for seed in range(300)]
    assert np.mean([one.size for one in samples]) == pytest.approx(6000, rel=0.02)
    for policy in list(rows.terms)[:2]:

        def contribution(given: HeldOutRows, policy: CandidatePolicy = policy) -> np.ndarray:
            one = given.terms[policy]
            return one.weight * (given.reward - given.action_reward) + one.expected_reward

        whole = contribution(rows)
        found = np.array([one.mean(contribution(one)) for one in samples])
        spread = found.std(ddof=1)
        assert abs(found.mean() - whole.mean()) < 4.5 * spread / 300**0.5
        # The error of the thinned rows is that of all rows and that of thinning.
        every = mean_error(whole, rows) ** 2
        errors = np.array([mean_error(contribution(one), one) ** 2 for one in samples])
        margin = 4.5 * (2.0 / 299) ** 0.5 * spread**2
        assert abs(errors.mean() - every - spread**2) < margin + 0.02 * every
        again = np.array([whole_error(contribution(one), one) ** 2 for one in samples])
        noise = again.std(ddof=1) / 300**0.5
        assert abs(again.mean() - every) < 4.5 * noise + 0.01 * every


def test_promises_of_thinned_rows_hold_at_rare_rewards() -> None:
    """At confidence .95, P(more than 18 of 120 promises above the truth) is below 1e-4."""
    exceeded = 0
    for seed in range(120):
        world = RareRewards(seed, 5000)
        found = choose(thinned(world.rows, 20, seed), ["model"], tolerance=Tolerance(0.005))
        softer = (one for one in SCALES if one <= found.chosen.inverse_temperature)
        exceeded += found.low > max(map(world.value, softer))
    assert exceeded <= 18


@pytest.mark.parametrize("thinning", [1, 20])
def test_a_prediction_that_no_row_checks_is_no_promise(thinning: int) -> None:
    """The policy plays an item that the model overrates and no row shows. The log shows all items
    alike, 1 % of its rows are rewarded and the model is right about them, so residuals are small.
    """
    n = items = 20_000
    rng = np.random.default_rng(0)
    terms = {
        # Probabilities exp(-50 s) of every other item.
        CandidatePolicy("model", s): HeldOutTerms(
            np.full(n, items * np.exp(-50.0 * s)), np.full(n, 0.98)
        )
        for s in SCALES
    }
    rows = HeldOutRows(
        reward=(rng.random(n) < 0.01).astype(float),
        terms=terms,
        action_reward=np.full(n, 0.01),
        scale={"model": 1.0},
        loss={"model": 0.05},
        unit=None,
        pscore=np.full(n, 1.0 / items),
        eligible_items=np.full(n, float(items)),
    )
    if thinning > 1:
        rows = thinned(rows, thinning, seed=1)
    found = choose(rows, ["model"], tolerance=Tolerance(0.005))
    assert found.chosen.value == pytest.approx(0.98, abs=1e-6)
    # What remains without the model: no weighted reward.
    assert found.low == pytest.approx(0.0, abs=1e-9)
    assert found.keep_logging


def test_candidates_that_left_count_in_the_bounds() -> None:
    rows = RareRewards(3).rows
    alone, others = (choose(rows, ["model"], dropped=k).estimates["model"] for k in (0, 5))
    for one, other in zip(alone, others, strict=True):
        assert other.lower_bound < one.lower_bound
        assert other.gain_lower_bound < one.gain_lower_bound
        assert other.value == one.value
    # A sixth of the error for these policies.
    third = estimate_policies(rows, list(rows.terms), replace(LEVELS, share=1 / 6))
    wanted = estimate_policies(rows, list(rows.terms), Levels(0.0, 1 - 0.05 / 6, 1 - 0.01 / 6))
    assert [one.lower_bound for one in third] == pytest.approx([o.lower_bound for o in wanted])
