"""Consistent and inconsistent logged propensities, and estimated ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from offtower.errors import DataError, OfftowerError
from offtower.evaluation import estimate_propensities, pscore_calibration


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def log(
    n: int, items: int, seed: int = 0, floor: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contexts, actions and their true probabilities under a softmax policy with a floor."""
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(n, 3))
    policy = softmax(context @ rng.normal(size=(3, items)))
    policy = floor + (1.0 - items * floor) * policy
    action = (policy.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(max=items - 1)
    return context, action, policy[np.arange(n), action]


@pytest.mark.parametrize("floor", [None, 0.02])
def test_true_propensities_hold_together(floor: float | None) -> None:
    """100 logs of heavy-tailed 1 / pscore, each alarms with at most 1 %: over 5 has 5e-4."""
    alarms = 0
    for seed in range(100):
        _, action, p = log(500, 8, seed, floor or 0.0)
        alarms += not pscore_calibration(p, action, 8, least_pscore=floor).ok
    assert alarms <= 5


@pytest.mark.parametrize(("factor", "floor"), [(0.7, None), (1.3, 0.01)])
def test_propensities_wrong_for_some_items_are_found(factor: float, floor: float | None) -> None:
    """Too small ones without more ado, too large ones where the logging policy has a floor."""
    _, action, p = log(40_000, 20, 0, 0.01)
    wrong = np.where(action < 5, np.minimum(1.0, factor * p), p)
    group = np.arange(20) // 5
    got = pscore_calibration(wrong, action, 20, group, least_pscore=floor)
    assert [g.ok for g in got.groups] == [False, True, True, True]
    assert [g.items for g in got.groups] == [5] * 4
    assert got.groups[0].mass == pytest.approx(1 / factor, rel=0.1)
    content = json.loads(json.dumps(got.to_dict()))
    assert content["ok"] is False and len(content["groups"]) == 4


def test_mass_by_hand() -> None:
    got = pscore_calibration([0.5, 0.25, 0.5, 1.0], [0, 1, 0, 1], 2)
    assert [g.mass for g in got.groups] == pytest.approx([1.0, 1.25])
    assert [g.n for g in got.groups] == [2, 2] and got.groups[0].high is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.0], [0, 1], 2), r"\(0, 1\]"),
        (([0.5, 0.5], [0, 2], 2), r"integers in \[0, 2\)"),
        (([0.5, 0.5], [0, -1], 2), r"integers in \[0, 2\)"),
        (([0.5], [0], 2), "one length"),
        (([0.5, 0.5], [0, 1], 2, [0]), "2 codes"),
    ],
)
def test_malformed_arrays_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pscore_calibration(*arguments)  # type: ignore[arg-type]


def test_estimated_propensities_come_near_the_true_ones() -> None:
    context, action, true = log(6000, 6)
    got = estimate_propensities(context, action, 6)
    assert np.corrcoef(np.log(got.pscore), np.log(true))[0, 1] > 0.99
    assert got.log_loss == pytest.approx(-np.log(true).mean(), abs=0.01)
    assert got.log_loss < got.marginal_log_loss - 0.1
    assert got.temperature == pytest.approx(1.0, abs=0.1)
    assert 0.8 < got.mean_inverse < 1.2  # heavy tail: most logs fall short of 1
    assert "no interval covers their error" in json.dumps(got.to_dict())
    again = estimate_propensities(context, action, 6)
    assert np.array_equal(got.pscore, again.pscore)


def test_the_temperature_tames_an_overconfident_model() -> None:
    """Sixty useless features and 120 rows: held out, the raw model is worse than frequencies."""
    rng = np.random.default_rng(1)
    got = estimate_propensities(rng.normal(size=(120, 60)), rng.integers(0, 4, 120), 4)
    assert got.temperature > 2.0
    assert got.log_loss < got.marginal_log_loss + 0.05


def test_a_user_is_never_in_both_parts() -> None:
    """Each user always sees an item of their own: held out by user, nothing can be known of it."""
    user = np.repeat(np.arange(40), 10)
    context = np.eye(40)[user]
    action = user % 4
    by_row = estimate_propensities(context, action, 4)
    by_user = estimate_propensities(context, action, 4, user=user)
    assert by_row.pscore.mean() > 0.9 > 0.4 > by_user.pscore.mean()


def test_rare_and_absent_items_have_positive_propensities() -> None:
    rng = np.random.default_rng(2)
    action = np.array([0] * 60 + [1] * 39 + [7])
    got = estimate_propensities(rng.normal(size=(100, 2)), action, 9)
    assert got.pscore.min() > 0.0 and got.pscore.max() <= 1.0


def test_what_cannot_be_estimated_is_refused() -> None:
    context, action, _ = log(100, 4)
    with pytest.raises(OfftowerError, match="6,000 items cannot be estimated by a dense model"):
        estimate_propensities(context, action, 6000)
    with pytest.raises(DataError, match="at least 10 integers"):
        estimate_propensities(context[:5], action[:5], 4)
    with pytest.raises(DataError, match=r"context must be \(100, p\)"):
        estimate_propensities(context[:, 0], action, 4)


def restricted_log(n: int, items: int, seed: int) -> tuple[np.ndarray, ...]:
    """Rows with eligible items of their own: contexts, actions, true probabilities and sets."""
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(n, 3))
    eligible = rng.random((n, items)) < np.linspace(0.15, 0.9, items)
    eligible[np.arange(n), rng.integers(0, items, n)] = True
    score = np.where(eligible, context @ rng.normal(size=(3, items)), -np.inf)
    policy = softmax(score)
    action = (policy.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(max=items - 1)
    return context, action, policy[np.arange(n), action], eligible


def test_propensities_are_estimated_over_eligible_items() -> None:
    """Where items are eligible in few rows, a model over all items is far off."""
    context, action, truth, eligible = restricted_log(1500, 6, 0)
    found = estimate_propensities(context, action, 6, eligible=eligible)
    error = np.abs(np.log(found.pscore) - np.log(truth))
    over_all = estimate_propensities(context, action, 6)
    assert np.median(error) < 0.15 < np.median(np.abs(np.log(over_all.pscore) - np.log(truth)))
    assert abs(found.mean_inverse - 1.0) < 0.1
    assert found.log_loss < found.marginal_log_loss
    alone = eligible.sum(axis=1) == 1
    assert alone.any()
    np.testing.assert_allclose(found.pscore[alone], 1.0)


def test_the_conditional_logit_is_the_multinomial_one_where_every_item_is_eligible() -> None:
    context, action, _ = log(400, 5, 3)
    plain = estimate_propensities(context, action, 5)
    every = estimate_propensities(context, action, 5, eligible=np.ones((400, 5), dtype=bool))
    np.testing.assert_allclose(every.pscore, plain.pscore, rtol=2e-3)


def test_an_action_that_is_not_eligible_is_refused() -> None:
    context, action, _, eligible = restricted_log(50, 4, 1)
    eligible[7, action[7]] = False
    with pytest.raises(DataError, match="rules out an action"):
        estimate_propensities(context, action, 4, eligible=eligible)


def test_the_gain_over_frequencies_has_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    action = rng.choice(3, 4000, p=[0.9, 0.05, 0.05])
    got = estimate_propensities(rng.normal(size=(4000, 2)), action, 3)
    assert abs(got.gain_z) < 5.0  # Features without information: neither better nor worse.
    context = np.zeros((4000, 1))
    context[:, 0] = np.where(action == 0, 0.0, 1.0)
    assert estimate_propensities(context, action, 3).gain_z > 5.0
