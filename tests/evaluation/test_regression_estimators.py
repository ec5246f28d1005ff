"""Regression estimators against least squares, and their variance against the other estimators'."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offtower.evaluation import EvaluationRows, evaluate_rows
from offtower.evaluation import estimators as e
from offtower.evaluation.intervals.statistics import finish

from .one_context import OneContext


def some_rows(n: int, seed: int = 0, users: int | None = None) -> EvaluationRows:
    """Contexts with their own expected rewards, and a reward model of the wrong scale."""
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(-0.5, 1.0, n)
    action_reward, expected_reward = rng.random(n), rng.random(n)
    reward = 1.5 * action_reward - 0.6 + 0.3 * rng.random(n)
    user = None if users is None else rng.integers(0, users, n)
    return EvaluationRows(weight, reward, action_reward, expected_reward, user, np.arange(n))


def outcome_and_controls(rows: EvaluationRows) -> tuple[np.ndarray, np.ndarray]:
    weight = rows.importance_weight
    balance = weight * rows.action_reward - rows.expected_reward
    return weight * rows.reward, np.stack([weight - 1.0, balance], axis=1)


def hc3(outcome: np.ndarray, controls: np.ndarray) -> tuple[float, float]:
    """Intercept of least squares, and its error from residuals over 1 - leverage."""
    n = outcome.size
    centered = controls - controls.mean(axis=0)
    slope = np.linalg.lstsq(centered, outcome - outcome.mean(), rcond=None)[0]
    residual = outcome - outcome.mean() - centered @ slope
    hat = np.einsum("ij,ji->i", centered, np.linalg.pinv(centered))
    error = np.sqrt(n / (n - 1) * np.sum((residual / (1.0 - hat)) ** 2)) / n
    return outcome.mean() - controls.mean(axis=0) @ slope, error


def test_the_value_is_the_intercept_of_least_squares_with_jackknife_errors() -> None:
    rows = some_rows(60)
    outcome, controls = outcome_and_controls(rows)
    for estimator, used in ((e.RegIPS(), controls[:, :1]), (e.RegDR(), controls)):
        value, error = hc3(outcome, used)
        found = estimator.estimate(rows)
        assert found.value == pytest.approx(value, rel=1e-10)
        assert found.std_error == pytest.approx(error, rel=1e-8)


def test_a_paired_difference_has_coefficients_of_its_own() -> None:
    rows = some_rows(60)
    outcome, controls = outcome_and_controls(rows)
    difference = e.Difference(e.RegDR(), e.MeanReward())
    found = finish(difference, difference.statistics(rows, rows))
    value, error = hc3(outcome - rows.reward, controls)
    assert found.value == pytest.approx(value, rel=1e-9)
    assert found.std_error == pytest.approx(error, rel=1e-8)
    assert abs(found.value - e.RegDR().estimate(rows).value + rows.reward.mean()) > 1e-3
    other = replace(rows, importance_weight=rows.importance_weight[::-1])
    other_outcome, other_controls = outcome_and_controls(other)
    between = e.Difference(e.RegDR(), e.RegDR())
    found = finish(between, between.statistics(rows, other))
    value, _ = hc3(outcome - other_outcome, np.concatenate([controls, other_controls], axis=1))
    assert found.value == pytest.approx(value, rel=1e-9)


def test_rows_of_users_give_coefficients_and_errors_by_user() -> None:
    rows = some_rows(300, users=25)
    assert rows.user is not None
    terms = e.RegDR().terms(rows)
    centered = terms - terms.mean(axis=0)
    sums = np.stack([centered[rows.user == user].sum(axis=0) for user in np.unique(rows.user)])
    slope = np.linalg.lstsq(sums[:, 1:], sums[:, 0], rcond=None)[0]
    residual = sums[:, 0] - sums[:, 1:] @ slope
    hat = np.einsum("ij,ji->i", sums[:, 1:], np.linalg.pinv(sums[:, 1:]))
    users = len(sums)
    error = np.sqrt(users / (users - 1) * np.sum((residual / (1.0 - hat)) ** 2)) / rows.n
    found = e.RegDR().finish(e.RegDR().statistics(rows, by_user=True))
    expected = terms.mean(axis=0) - np.array([0.0, 1.0, 0.0])
    assert found.value == pytest.approx(expected[0] - expected[1:] @ slope, rel=1e-9)
    assert found.std_error == pytest.approx(error, rel=1e-8)


def test_shards_merge_to_the_whole() -> None:
    rows = some_rows(9_000)  # more rows than groups
    parts = [e.RegDR().statistics(rows.take(slice(i, i + 3_000))) for i in (0, 3_000, 6_000)]
    merged = e.RegDR().finish(parts[0].merge(parts[1]).merge(parts[2]))
    whole = e.RegDR().estimate(rows)
    assert merged.value == pytest.approx(whole.value, rel=1e-12)
    assert merged.std_error == pytest.approx(whole.std_error, rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0, 3.0])
def test_no_weighted_average_of_the_consistent_estimators_has_a_smaller_error(scale: float) -> None:
    """Least squares are the best coefficients in the sample; the jackknife adds of order 1 / n."""
    rows = OneContext(8).sample(4_000, np.random.default_rng(3))
    assert rows.action_reward is not None and rows.expected_reward is not None
    rows = replace(
        rows,
        action_reward=scale * rows.action_reward,
        expected_reward=scale * rows.expected_reward,
    )
    others = [e.IPS(), e.SNIPS(), e.DR(), e.SNDR()]
    influence = np.stack([one.contributions(rows) for one in others])
    error = e.RegDR().estimate(rows).std_error
    assert error <= 1.005 * min(one.estimate(rows).std_error for one in others)
    covariance = np.cov(influence)
    weights = np.linalg.pinv(covariance, hermitian=True).sum(axis=1)
    weights = weights / weights.sum()
    assert error <= 1.005 * np.sqrt(weights @ covariance @ weights / rows.n)


def test_values_and_errors_are_right_over_many_logs() -> None:
    """1,000 logs of 400 rows; each assertion fails by chance in fewer than 1 in 1e4 seeds: 4.4
    standard errors for the means; the error's mean square has a bias of order 1 / n besides."""
    world, rng = OneContext(8), np.random.default_rng(11)
    found = np.array(
        [
            [[x.value, x.std_error] for x in (e.RegIPS().estimate(rows), e.RegDR().estimate(rows))]
            for rows in (world.sample(400, rng) for _ in range(1_000))
        ]
    )
    for value, error in found.transpose(1, 2, 0):
        assert abs(value.mean() - world.value) < 4.4 * value.std() / np.sqrt(1_000) + 1e-3
        assert (error**2).mean() == pytest.approx(value.var(), rel=0.2)


def test_equal_rewards_and_equal_policies_have_no_error() -> None:
    rows = some_rows(80)
    constant = replace(rows, reward=np.full(80, 0.25))
    found = e.RegIPS().estimate(constant)
    assert found.value == pytest.approx(0.25, rel=1e-12) and found.std_error < 1e-12
    same = replace(rows, importance_weight=np.ones(80))
    difference = e.Difference(e.RegIPS(), e.MeanReward())
    found = finish(difference, difference.statistics(same, same))
    assert found.value == pytest.approx(0.0, abs=1e-15) and found.std_error == 0.0


def test_verdicts_use_a_regression_estimator_where_one_is_asked_for() -> None:
    rows = some_rows(2_000)
    result = evaluate_rows({"new": rows}, ["ips", "dr", "reg_dr"], reward_range=(-1.0, 2.0))
    assert result.decide_by == "reg_dr"
    gap = result.policies["new"].estimates["reg_dr"].difference
    assert gap is not None
    difference = e.Difference(e.RegDR(), e.MeanReward())
    alone = finish(difference, difference.statistics(rows, rows))
    assert gap.estimate.value == pytest.approx(alone.value, rel=1e-9)
    assert gap.estimate.std_error == pytest.approx(alone.std_error, rel=1e-9)
    assert gap.interval.low < alone.value < gap.interval.high


@pytest.mark.parametrize("users", [None, 3])
def test_few_units_fit_no_coefficients(users: int | None) -> None:
    rows = some_rows(5 if users is None else 90, users=users)
    found = evaluate_rows({"p": rows}, (e.RegDR(), e.RegIPS()), reward_range=(-1, 2)).policies["p"]
    for estimator, plain in ((e.RegDR(), e.DR()), (e.RegIPS(), e.IPS())):
        value = finish(plain, plain.statistics(rows, by_user=users is not None))
        got = found.estimates[estimator.name].estimate
        assert (got.value, got.std_error) == pytest.approx((value.value, value.std_error))
    assert "too_few_units" in [reason.code for reason in found.verdict.reasons]
    enough = evaluate_rows({"p": some_rows(13)}, (e.RegDR(),), reward_range=(-1, 2)).policies["p"]
    assert "too_few_units" not in [reason.code for reason in enough.verdict.reasons]
