"""objective=auto: the choice between candidates by their held-out rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offtower.training.auto.choice import choose
from offtower.training.auto.held_out import (
    INVERSE_TEMPERATURES,
    CandidatePolicy,
    HeldOutRows,
    HeldOutTerms,
)


def held_out(
    weight: dict[str, np.ndarray], reward: np.ndarray, predicted: dict[str, float]
) -> HeldOutRows:
    """Equal weights at each temperature; the model predicts `predicted` for all items played."""
    n = len(reward)
    return HeldOutRows(
        reward=reward,
        terms={
            CandidatePolicy(name, s): HeldOutTerms(weight[name], np.full(n, predicted[name]))
            for name in weight
            for s in INVERSE_TEMPERATURES
        },
        action_reward=np.full(n, 0.3),
        scale=dict.fromkeys(weight, 1.0),
        loss={"model": 0.5},
        unit=None,
        pscore=np.full(n, 1e12),
        eligible_items=np.full(n, 10.0),
    )


@pytest.mark.parametrize(
    ("items", "support_factor"), [(2000.0, 1.0), (500.0, 0.5), (10.0, 0.01), (0.0, 0.0)]
)
def test_a_short_log_is_no_evidence_against_a_sharp_policy(
    items: float, support_factor: float
) -> None:
    """No row shows what a sharp policy plays: of 2,000 rows of 10 items that is proof, of 2,000
    items chance."""
    rng = np.random.default_rng(0)
    reward = (rng.random(2000) < 0.3).astype(float)
    nothing = {"model": np.zeros(2000)}
    pscore = np.full(2000, 1.0 / items if items else 1e300)
    found = replace(held_out(nothing, reward, {"model": 0.9}), pscore=pscore)
    choice = choose(found, ["model"])
    assert choice.chosen.support_factor == pytest.approx(support_factor, abs=1e-12)


def test_predictions_for_items_that_the_log_never_shows_are_discounted() -> None:
    rng = np.random.default_rng(0)
    reward = (rng.random(2000) < 0.3).astype(float)
    supported, unseen = np.ones(2000), np.zeros(2000)
    choice = choose(
        held_out({"safe": supported, "wild": unseen}, reward, {"safe": 0.3, "wild": 0.95}),
        ["safe", "wild"],
    )
    assert choice.chosen.name == "safe"
    assert choice.best["wild"].value == pytest.approx(0.0, abs=1e-12)
    # Half of what it plays is in the log: half of the promise is believed.
    half = held_out({"half": np.full(2000, 0.5)}, np.full(2000, 0.3), {"half": 0.95})
    assert choose(half, ["half"]).chosen.value == pytest.approx(0.5 * 0.95, abs=1e-9)


def test_a_later_candidate_must_be_better_by_more_than_noise() -> None:
    rng = np.random.default_rng(1)
    reward = (rng.random(4000) < 0.3).astype(float)
    plain = np.ones(4000)
    better = np.where(reward == 1.0, 1.3, 0.7)
    same = plain + 0.3 * rng.standard_normal(4000).clip(-2, 2)
    names = {"first": plain, "noise": same, "better": better}
    promise = dict.fromkeys(names, 0.3)
    wins = choose(held_out(names, reward, promise), ["first", "noise", "better"])
    assert wins.chosen.name == "better"
    # Without evidence for or against it, the largest inverse temperature is taken.
    assert wins.chosen.inverse_temperature == INVERSE_TEMPERATURES[-1]


def test_a_lower_bound_beats_only_a_policy_off_the_log() -> None:
    """A few heavy rows make the first's value noisy, whether or not the log plays what it plays."""

    def first(rows: int, weight: float, rewarded: int) -> str:
        heavy, reward = np.zeros(1000), np.ones(1000)
        heavy[:rows] = weight
        reward[rewarded:rows] = 0.0
        weights = {"noisy": heavy, "steady": np.ones(1000)}
        found = held_out(weights, reward, {"noisy": 0.95, "steady": 0.3})
        choice = choose(found, list(weights))
        noisy, steady = (choice.best[name] for name in weights)
        difference = steady.contribution - noisy.contribution
        assert steady.low > noisy.value
        assert difference.mean() < 2 * difference.std() / 1000**0.5
        assert (noisy.support_factor < 1.0) == (rows * weight < 600)
        return choice.chosen.name

    assert first(25, 40.0, 7) == "noisy"
    assert first(6, 83.0, 2) == "steady"


def test_rows_of_one_context_count_once() -> None:
    rng = np.random.default_rng(5)
    weight, reward = rng.exponential(size=300), (rng.random(300) < 0.4).astype(float)
    alone = choose(held_out({"a": weight}, reward, {"a": 0.4}), ["a"]).chosen
    repeated = held_out({"a": np.tile(weight, 7)}, np.tile(reward, 7), {"a": 0.4})
    apart = choose(repeated, ["a"]).chosen
    together = choose(replace(repeated, unit=np.tile(np.arange(300), 7)), ["a"]).chosen
    # Of kappa too, which is 1 here either way.
    assert together.low == pytest.approx(alone.low, abs=1e-12)
    assert apart.value - apart.low == pytest.approx((alone.value - alone.low) / 7**0.5, rel=0.01)
