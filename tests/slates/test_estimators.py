"""Estimators of slates against enumeration, over simulated logs, and by round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offtower.data.rounds import Rounds
from offtower.errors import DataError, OfftowerError
from offtower.evaluation import EvaluationRows
from offtower.evaluation.estimators import (
    DM,
    DR,
    IPS,
    SNDR,
    SNIPS,
    ClippedDR,
    ClippedIPS,
    Standard,
)
from offtower.evaluation.evaluate import evaluate_rows
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.sums import EvaluationSums
from offtower.slates import remaining_expected_reward, slate_weights

from .worlds import ITEMS, POSITIONS, SLATES, SlateWorld, conditionals


def rows_of(world, x, slate, reward, q=None, target=None):
    """EvaluationRows of drawn rounds; q: (X, 8) a reward model."""
    target = world.target if target is None else target
    pi_e, pi_0 = conditionals(target)[x, slate], conditionals(world.logging)[x, slate]
    rounds = Rounds.of_lengths(np.full(len(x), POSITIONS))
    weights = slate_weights(
        torch.from_numpy(np.log(pi_e).reshape(-1)),
        torch.from_numpy(np.log(pi_0).reshape(-1)),
        rounds,
        "conditional",
    )
    items, models = SLATES[slate], {}
    if q is not None:
        shown = np.take_along_axis(q[x], items, axis=1)
        expected = remaining_expected_reward(
            torch.from_numpy(np.log(np.take_along_axis(target[x], items, axis=1)).reshape(-1)),
            torch.from_numpy((target * q).sum(axis=1)[x]),
            torch.from_numpy(shown.reshape(-1)),
            rounds,
        )
        models = {"action_reward": shown.reshape(-1), "expected_reward": expected.numpy()}
    return EvaluationRows(
        importance_weight=weights.cascade.exp().numpy(),
        reward=reward.reshape(-1),
        row=np.arange(reward.size),
        round=rounds.number,
        earlier_weight=weights.earlier.exp().numpy(),
        slate_weight=weights.slate.exp().numpy(),
        **models,
    )


def every_slate(world):
    """Each context and slate once, and their probability under the logging policy."""
    x = np.repeat(np.arange(world.contexts), len(SLATES))
    slate = np.tile(np.arange(len(SLATES)), world.contexts)
    probability = world.slate_probability(world.logging)[x, slate] / world.contexts
    return x, slate, probability


QS = np.random.default_rng(9).uniform(size=(4, ITEMS))


@pytest.mark.parametrize("estimator", [IPS(), DR(), Standard(IPS()), Standard(DR())])
def test_expectations_equal_enumeration(estimator):
    world = SlateWorld.make(0)
    x, slate, probability = every_slate(world)
    rows = rows_of(world, x, slate, world.mean[x, slate], QS)
    terms = rows.summed(estimator.terms(rows))[:, 0]
    assert probability @ terms == pytest.approx(world.value(world.target), abs=1e-10)


def test_standard_holds_where_rewards_depend_on_later_items_and_cascade_does_not():
    world = SlateWorld.make(1, beyond=2.0)
    x, slate, probability = every_slate(world)
    rows = rows_of(world, x, slate, world.mean[x, slate])
    truth = world.value(world.target)
    found = [probability @ rows.summed(e.terms(rows))[:, 0] for e in (Standard(IPS()), IPS())]
    assert found[0] == pytest.approx(truth, abs=1e-10)
    assert abs(found[1] - truth) > 1e-3


def test_self_normalized_ratios_have_the_right_limits():
    world = SlateWorld.make(2)
    x, slate, probability = every_slate(world)
    rows = rows_of(world, x, slate, world.mean[x, slate], QS)
    for estimator in (SNIPS(), SNDR(), Standard(SNIPS())):
        mean = probability @ rows.summed(estimator.terms(rows))
        assert mean[0] == pytest.approx(1.0, abs=1e-10)
        assert estimator.combine(mean) == pytest.approx(world.value(world.target), abs=1e-10)


def test_weights_of_one_policy_give_the_logged_mean():
    world = SlateWorld.make(3)
    x, slate, reward = world.draw(500, np.random.default_rng(0))
    rows = rows_of(world, x, slate, reward, QS, target=world.logging)
    logged = reward.sum(axis=1).mean()
    for estimator in (IPS(), SNIPS(), Standard(IPS()), ClippedIPS(1e9)):
        assert estimator.estimate(rows).value == pytest.approx(logged, abs=1e-9)
    result = evaluate_rows({"same": rows}, reward_range=(0.0, 1.0))
    policy = result.policies["same"]
    assert result.n == 500
    assert result.logging.estimate.value == pytest.approx(logged, abs=1e-12)
    assert [one.n for one in policy.positions] == [500] * 3
    assert all(abs(one.mean - 1.0) < 1e-9 for one in policy.positions)
    assert policy.guaranteed_value is None


def test_clipping_applies_to_the_weights_of_earlier_positions_too():
    rows = EvaluationRows(
        importance_weight=np.array([4.0, 8.0, 0.5, 3.0]),
        reward=np.array([1.0, 1.0, 0.0, 1.0]),
        action_reward=np.full(4, 0.5),
        expected_reward=np.full(4, 0.25),
        round=np.array([5, 5, 6, 6]),
        earlier_weight=np.array([1.0, 4.0, 1.0, 0.5]),
    )
    # min(w, 2) (r - q) + {1, min(w_earlier, 2)} m by round, and their mean.
    first = 2 * 0.5 + 0.25 + 2 * 0.5 + 2 * 0.25
    second = 0.5 * -0.5 + 0.25 + 2 * 0.5 + 0.5 * 0.25
    assert ClippedDR(2.0).estimate(rows).value == pytest.approx((first + second) / 2)


def test_errors_are_clustered_by_round_and_by_user():
    rng = np.random.default_rng(4)
    rounds, k = 200, 5
    effect = rng.normal(size=rounds)
    reward = np.repeat(effect, k) + 0.1 * rng.normal(size=rounds * k)
    number = np.repeat(np.arange(rounds), k)
    rows = EvaluationRows(importance_weight=np.ones(reward.size), reward=reward, round=number)
    sums = reward.reshape(rounds, k).sum(axis=1)
    estimate = IPS().estimate(rows)
    assert estimate.n == rounds
    assert estimate.value == pytest.approx(sums.mean())
    assert estimate.std_error == pytest.approx(sums.std(ddof=1) / np.sqrt(rounds))
    boot = IPS().interval(rows, method="bootstrap", replicates=400, seed=1)
    assert (boot.high - boot.low) / 3.92 == pytest.approx(estimate.std_error, rel=0.25)
    user = np.repeat(np.arange(rounds) // 4, k)
    by_user = EvaluationRows(
        importance_weight=np.ones(reward.size), reward=reward, round=number, user=user
    )
    centered = (sums - sums.mean()).reshape(-1, 4).sum(axis=1)
    expected = np.sqrt(50 / 49 * (centered**2).sum()) / rounds
    found = IPS().statistics(by_user, by_user=True)
    assert IPS().finish(found).std_error == pytest.approx(expected)


def test_shards_of_whole_rounds_merge_to_the_same_numbers():
    world = SlateWorld.make(5)
    x, slate, reward = world.draw(300, np.random.default_rng(1))
    rows = rows_of(world, x, slate, reward, QS)
    options = EvaluationOptions((IPS(), SNIPS(), DR(), Standard(IPS())), (0.0, 1.0))
    whole = EvaluationSums.of({"p": rows}, options).finish().to_dict()
    cut = 3 * 117
    parts = [
        EvaluationSums.of({"p": rows.take(part)}, options)
        for part in (slice(0, cut), slice(cut, rows.n))
    ]
    merged = parts[0].merge(parts[1]).finish().to_dict()
    for name, one in whole["policies"]["p"]["estimates"].items():
        other = merged["policies"]["p"]["estimates"][name]
        for key in ("value", "std_error", "n"):
            assert other[key] == pytest.approx(one[key], rel=1e-12)
        for method in ("normal", "bootstrap"):
            assert other["intervals"][method]["low"] == pytest.approx(
                one["intervals"][method]["low"], rel=1e-9
            )
    assert merged["policies"]["p"]["diagnostics"]["positions"][2]["mean"] == pytest.approx(
        whole["policies"]["p"]["diagnostics"]["positions"][2]["mean"]
    )


def test_unbiased_over_logs_and_intervals_cover():
    """2,000 logs of 300 rounds: means within three standard errors, coverage in .93 to .97.

    With 5 estimators a false alarm of a mean within three standard errors has probability .013;
    the seed is fixed. Coverage .95 of 2,000 logs has a standard error of .005.
    """
    world = SlateWorld.make(6, distance=0.3)
    truth = world.value(world.target)
    rng = np.random.default_rng(7)
    estimators = {"ips": IPS(), "snips": SNIPS(), "dr": DR(), "sips": Standard(IPS())}
    covered = dict.fromkeys(estimators, 0)
    q = QS
    logs, size = 2000, 300
    x, slate, reward = world.draw(logs * size, rng)
    rows = rows_of(world, x, slate, reward, q)
    for name, estimator in estimators.items():
        terms = rows.summed(estimator.terms(rows)).reshape(logs, size, -1)
        mean = terms.mean(axis=1)
        value = estimator.combine(mean)
        slope = np.stack([estimator.gradient(m) for m in mean])
        spread = ((terms - mean[:, None]) * slope[:, None]).sum(axis=2)
        error = spread.std(axis=1, ddof=1) / np.sqrt(size)
        covered[name] = float((np.abs(value - truth) < 1.96 * error).mean())
        # What the package computes for one log is the same.
        one = estimator.estimate(rows.take(slice(0, size * POSITIONS)))
        assert one.value == pytest.approx(value[0], rel=1e-9)
        assert one.std_error == pytest.approx(error[0], rel=1e-9)
        if name != "snips":  # A ratio has a bias of order 1 / n.
            few = value[:400]
            assert abs(few.mean() - truth) < 3.0 * few.std(ddof=1) / np.sqrt(400)
        assert 0.93 <= covered[name] <= 0.97, (name, covered[name])


def test_refusals_say_what_is_missing():
    rows = EvaluationRows(
        importance_weight=np.ones(4),
        reward=np.zeros(4),
        action_reward=np.zeros(4),
        expected_reward=np.zeros(4),
        round=np.array([0, 0, 1, 1]),
    )
    with pytest.raises(OfftowerError, match="log conditional pscores"):
        DR().estimate(rows)
    with pytest.raises(OfftowerError, match="no form for slates"):
        DM().estimate(rows)
    with pytest.raises(OfftowerError, match="slate_weight"):
        Standard(IPS()).estimate(rows)
    with pytest.raises(OfftowerError, match="over the positions"):
        IPS().interval(rows, method="bernstein", reward_range=(0.0, 1.0), max_weight=9.0)
    with pytest.raises(OfftowerError, match="by round"):
        IPS().interval(rows, method="log_smoothing", reward_range=(0.0, 1.0))


@pytest.mark.parametrize("estimator", [IPS(), SNIPS(), DR(), Standard(IPS())])
def test_weights_of_positions_are_those_of_rewards_and_predictions(estimator):
    """A value is linear in them: that of all positions is the sum of those of each alone."""
    rng = np.random.default_rng(5)
    weight = rng.uniform(0.5, 1.5, 60)
    number = np.repeat(np.arange(20), 3)
    rows = EvaluationRows(
        weight,
        rng.uniform(size=60),
        rng.uniform(size=60),
        rng.uniform(size=60),
        round=number,
        earlier_weight=rng.uniform(0.5, 1.5, 60),
        slate_weight=np.repeat(rng.uniform(0.5, 1.5, 20), 3),
    )
    alone = [estimator.estimate(rows.with_position_weights(one)).value for one in np.eye(3)]
    alpha = [1.0, 0.5, 0.25]
    found = estimator.estimate(rows.with_position_weights(alpha)).value
    assert found == pytest.approx(np.dot(alpha, alone), rel=1e-12)
    assert estimator.estimate(rows).value == pytest.approx(sum(alone), rel=1e-12)
    with pytest.raises(DataError, match="2 weights of positions for slates of up to 3 items"):
        rows.with_position_weights([1.0, 1.0])
