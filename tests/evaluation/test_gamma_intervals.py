"""Gamma intervals: exact limits where they exist, and coverage where the normal interval fails."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2

from offtower.evaluation import EvaluationRows, estimators, evaluate_rows
from offtower.evaluation.intervals.gamma import InfluenceMoments, _pearson_quantile, gamma_interval
from offtower.evaluation.intervals.statistics import Statistics, collect
from offtower.evaluation.intervals.term_mean import TermMean
from offtower.evaluation.intervals.unseen import Span, weight_span

IPS, SNIPS = estimators.IPS(), estimators.SNIPS()


def some_rows(n: int = 500, seed: int = 3) -> EvaluationRows:
    rng = np.random.default_rng(seed)
    reward = (rng.random(n) < 0.2).astype(float)
    return EvaluationRows(rng.exponential(size=n), reward, row=np.arange(n))


@pytest.mark.parametrize("count", [1, 3, 20])
def test_limits_of_a_count_are_garwoods(count: int) -> None:
    moments = InfluenceMoments(1.0, 1e12, 1e12, 1.0, count, count, 0.0, 0.0)
    low, high = moments.limit(0.025, -1e-300), moments.limit(0.025, 1.0)
    assert count + low == pytest.approx(chi2.ppf(0.025, 2 * count) / 2, rel=1e-6)
    assert count + high == pytest.approx(chi2.ppf(0.975, 2 * count + 2) / 2, rel=1e-6)


def test_no_reward_gives_the_exact_binomial_limit() -> None:
    """Clopper and Pearson (1934): the upper limit p solves (1 - p)^n = .025."""
    rows = EvaluationRows(np.ones(300), np.zeros(300))
    interval = IPS.interval(rows, method="gamma", reward_range=(0, 1))
    assert interval.low == 0.0
    assert binom.cdf(0, 300, interval.high) == pytest.approx(0.025, rel=1e-9)
    every = evaluate_rows({"p": rows}, ["ips"], reward_range=(0, 2)).logging.interval
    assert every.high == pytest.approx(2 * interval.high)


def test_quantiles_of_small_skewness_join_the_others() -> None:
    for z in (-4.0, -1.96, 0.0, 2.5):
        below, above = _pearson_quantile(z, 0.999e-3), _pearson_quantile(z, 1.001e-3)
        assert below == pytest.approx(above, abs=1e-5)
        assert _pearson_quantile(z, -0.5) == pytest.approx(-_pearson_quantile(-z, 0.5))


def test_a_symmetric_mean_of_many_rows_has_the_normal_interval() -> None:
    values = np.tile([-1.0, 1.0], 2000)
    statistics = collect(values[:, None], EvaluationRows(np.ones(4000), values), grouped=True)
    interval = gamma_interval(TermMean(0, 1), statistics)
    half = 1.96 / np.sqrt(4000)
    assert interval.high == pytest.approx(-interval.low)
    assert half < interval.high < 1.03 * half


def test_shards_merge_to_the_whole() -> None:
    for n in (1000, 9000):
        rows = some_rows(n)
        parts = [rows.take(slice(0, 400)), rows.take(slice(400, n))]
        merged = SNIPS.statistics(parts[0], grouped=True)
        merged = merged.merge(SNIPS.statistics(parts[1], grouped=True))
        whole = gamma_interval(SNIPS, SNIPS.statistics(rows, grouped=True))
        found = gamma_interval(SNIPS, merged)
        assert (found.low, found.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_users_of_one_row_each_are_rows() -> None:
    rows = some_rows()
    single = EvaluationRows(rows.importance_weight, rows.reward, user=np.arange(rows.n))
    by_row = SNIPS.interval(rows, method="gamma")
    by_user = SNIPS.interval(single, method="gamma", by_user=True)
    assert (by_user.low, by_user.high) == pytest.approx((by_row.low, by_row.high), rel=1e-12)
    assert by_user.by_user


def test_units_of_reward_and_scale_of_weights_do_not_matter() -> None:
    rows = some_rows()
    base = SNIPS.interval(rows, method="gamma")
    dollars = EvaluationRows(rows.importance_weight, 1e9 * rows.reward)
    scaled = SNIPS.interval(dollars, method="gamma")
    assert (scaled.low / 1e9, scaled.high / 1e9) == pytest.approx((base.low, base.high))
    huge = EvaluationRows(1e300 * rows.importance_weight, rows.reward)
    assert np.isfinite(SNIPS.interval(huge, method="gamma").high)


@pytest.mark.parametrize("method", ["gamma", "normal"])
@pytest.mark.parametrize("offset", [1e6, 1e8])
def test_an_offset_of_rewards_does_not_matter(method: str, offset: float) -> None:
    """SNIPS of r + c is c more. The variance is below the rounding of the second moments of w r."""
    rng = np.random.default_rng(1)
    weight, reward = rng.gamma(4.0, 0.25, 400), (rng.random(400) < 0.3).astype(float)

    def difference(c: float, low: float) -> tuple[float, ...]:
        found = evaluate_rows(
            {"new": EvaluationRows(weight, reward + c)},
            ("snips",),
            reward_range=(low, low + 1.0),
            intervals=(method,),
        ).policies["new"]
        gain = found.estimates["snips"].difference
        return gain.estimate.std_error, gain.interval.low, gain.interval.high

    assert difference(offset, offset) == pytest.approx(difference(0.0, 0.0), rel=1e-5)


def test_missing_weight_widens_and_a_declared_bound_narrows() -> None:
    """Mean weight .2: a row that restores a mean of 1 may be missing."""
    rng = np.random.default_rng(0)
    reward = (rng.random(400) < 0.4).astype(float)
    complete = IPS.interval(EvaluationRows(np.ones(400), reward), method="gamma")
    rows = EvaluationRows(rng.uniform(0.1, 0.3, size=400), reward)
    lacking = IPS.interval(rows, method="gamma")
    bounded = IPS.interval(rows, method="gamma", max_weight=0.3)
    assert lacking.high - lacking.low > 1.5 * (bounded.high - bounded.low)
    assert bounded.high < complete.low


def weights_of(values: list[float]) -> Statistics:
    weight = np.array(values)
    return collect(weight[:, None], EvaluationRows(weight, weight))


def test_an_unseen_weight_follows_from_those_seen() -> None:
    near = weights_of([0.5] * 4 + [1.0] * 92 + [1.5] * 3 + [1.5])
    deviation = float(np.sqrt(near.covariance[0, 0]))
    assert weight_span(near) == Span(0.5, pytest.approx(1.0 + 2.0 * deviation))
    rare = weights_of([0.0] * 99 + [100.0])  # E w^2 / E w = 100, the largest seen.
    assert weight_span(rare) == Span(0.0, 100.0)
    assert weight_span(rare, 40.0).high == 40.0
    spread = weights_of([0.5] * 95 + [10.5] * 5)
    assert weight_span(spread).high == pytest.approx(1.0 + float(spread.covariance[0, 0]))
    missing = weights_of([0.5, 0.7] * 50)  # 100 (1 - .6) less one standard error; 10 times .7.
    assert weight_span(missing).high == pytest.approx(7.0)
    assert weight_span(weights_of([0.0, 0.0])) == Span(0.0, 0.0)


def test_a_verdict_of_a_heavy_tail_names_the_rows_needed() -> None:
    rng = np.random.default_rng(1)
    n = 3000
    reward = (rng.random(n) < 0.004) * rng.lognormal(0.0, 2.0, n)
    result = evaluate_rows(
        {"p": EvaluationRows(rng.exponential(size=n), reward)},
        ["snips"],
        reward_range=(0, 1e4),
    ).policies["p"]
    gap = result.estimates["snips"].difference
    assert gap is not None
    assert gap.interval.rows_needed is not None
    assert gap.interval.rows_needed > n
    assert any(
        f"{gap.simultaneous.rows_needed:,} rows" in r.message for r in result.verdict.reasons
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 1e30) | st.sampled_from([0.0, 1.0]),
            st.floats(-1e30, 1e30) | st.sampled_from([0.0, 1.0]),
        ),
        min_size=2,
        max_size=30,
    ),
    st.floats(0.01, 1.0 - 1e-9),
)
def test_limits_are_finite_and_hold_the_value(
    rows: list[tuple[float, float]], confidence: float
) -> None:
    weight, reward = np.array(rows).T
    found = EvaluationRows(np.append(weight, 1.0), np.append(reward, 0.5))
    for estimator in (IPS, SNIPS):
        interval = estimator.interval(found, confidence, "gamma", reward_range=(0, 1))
        value = estimator.estimate(found).value
        room = 1e-9 * max(1.0, abs(value))
        assert interval.low - room <= value <= interval.high + room
        assert np.isfinite([interval.low, interval.high]).all()


def test_few_rewarded_rows_are_a_doubt() -> None:
    reward = np.zeros(2000)
    reward[:7] = 1.0
    weight = np.random.default_rng(0).exponential(size=2000)
    found = evaluate_rows({"p": EvaluationRows(weight, reward)}, ["ips"], reward_range=(0, 1))
    messages = {r.code: r.message for r in found.policies["p"].verdict.reasons}
    assert "7 of 2,000 rows" in messages["too_few_rewarded_rows"]
    many = evaluate_rows({"p": some_rows()}, ["ips"], reward_range=(0, 1))
    codes = [reason.code for reason in many.policies["p"].verdict.reasons]
    assert "too_few_rewarded_rows" not in codes


@pytest.mark.parametrize("estimator", [IPS, SNIPS])
def test_rare_rewards_are_covered(estimator: estimators.Estimator) -> None:
    """Two rewards in 1,000 rows: normal covers .85 or less, gamma at least .95.

    300 logs: a coverage of .95 gives 267 or fewer covered with probability 2e-5.
    """
    rng = np.random.default_rng(7)
    covered, normal, logs, n = 0, 0, 300, 1000
    for _ in range(logs):
        weight = rng.choice([0.25, 1.75], size=n)
        rows = EvaluationRows(weight, (rng.random(n) < 0.002).astype(float))
        gamma = estimator.interval(rows, method="gamma", reward_range=(0, 1))
        covered += gamma.low <= 0.002 <= gamma.high
        plain = estimator.interval(rows)
        normal += plain.low <= 0.002 <= plain.high
    assert covered >= 268
    assert normal < 0.9 * logs
