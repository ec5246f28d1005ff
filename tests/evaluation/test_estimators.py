"""Properties of the estimators, their limits, their errors, and the tuning of their parameters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtower.errors import DataError, OfftowerError
from offtower.evaluation import EvaluationRows
from offtower.evaluation import estimators as e

from .one_context import OneContext

ALL = [
    e.IPS(),
    e.ClippedIPS(max_weight=2.0),
    e.SNIPS(),
    e.DM(),
    e.DR(),
    e.ClippedDR(max_weight=2.0),
    e.SNDR(),
    e.RegIPS(),
    e.RegDR(),
    e.SwitchDR(threshold=2.0),
    e.DRos(shrinkage=3.0),
    e.SubGaussianIPS(lambda_=0.2),
    e.SubGaussianDR(lambda_=0.2),
    e.LogSmoothing(lambda_=0.2),
    e.MIPS(),
]
OF_LOGGERS = [e.LoggerWeightedIPS(), e.LoggerWeightedDR()]
"""Tested in test_logger_weights, since their rows name the behavior policy."""
by_label = pytest.mark.parametrize("estimator", ALL, ids=lambda x: x.label)


def some_rows(n: int = 50, seed: int = 0) -> EvaluationRows:
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(-0.5, 1.0, n)
    return EvaluationRows(
        weight,
        rng.random(n),
        rng.random(n),
        rng.random(n),
        rng.integers(0, 12, n),
        np.arange(n),
        np.log(weight),
        rng.lognormal(-0.1, 0.3, n),
    )


@by_label
def test_contributions_carry_value_and_error(estimator: e.Estimator) -> None:
    rows = some_rows()
    estimate = estimator.estimate(rows)
    contributions = estimator.contributions(rows)
    assert contributions.shape == (rows.n,)
    assert contributions.mean() == pytest.approx(estimate.value, rel=1e-12)
    error = contributions.std(ddof=1) / np.sqrt(rows.n)
    assert error == pytest.approx(estimate.std_error, rel=1e-9)
    assert estimate.n == rows.n


@by_label
def test_gradient_is_the_derivative(estimator: e.Estimator) -> None:
    mean = estimator.terms(some_rows()).mean(axis=0)
    assert mean.size == estimator.num_terms
    for j, slope in enumerate(estimator.gradient(mean)):
        step = 1e-6 * np.eye(mean.size)[j]
        rise = estimator.combine(mean + step) - estimator.combine(mean - step)
        assert float(rise) / 2e-6 == pytest.approx(slope, abs=1e-7)


def test_parameters_reach_from_the_model_or_zero_to_the_unbiased_estimator() -> None:
    rows = some_rows()
    ips, dr, dm = (x.estimate(rows).value for x in (e.IPS(), e.DR(), e.DM()))
    same = {
        e.ClippedIPS(max_weight=np.inf): ips,
        e.SubGaussianIPS(lambda_=0.0): ips,
        e.LogSmoothing(lambda_=0.0): ips,
        e.LogSmoothing(lambda_=1e-9): ips,
        e.SubGaussianIPS(lambda_=1.0): rows.reward.mean(),
        e.ClippedDR(max_weight=np.inf): dr,
        e.SwitchDR(threshold=np.inf): dr,
        e.DRos(shrinkage=np.inf): dr,
        e.SubGaussianDR(lambda_=0.0): dr,
        e.ClippedDR(max_weight=0.0): dm,
        e.SwitchDR(threshold=0.0): dm,
        e.DRos(shrinkage=0.0): dm,
    }
    for estimator, value in same.items():
        assert estimator.estimate(rows).value == pytest.approx(value, rel=1e-7), estimator.name


def test_a_log_of_the_target_policy_gives_the_mean_reward() -> None:
    rows = some_rows()
    same = EvaluationRows(np.ones(50), rows.reward, cluster_weight=np.ones(50))
    for estimator in (e.IPS(), e.SNIPS(), e.MIPS(), e.SubGaussianIPS(lambda_=0.7)):
        estimate = estimator.estimate(same)
        assert estimate.value == pytest.approx(rows.reward.mean(), rel=1e-14)


@given(st.integers(0, 10**6), st.floats(-50.0, 50.0))
def test_self_normalized_values_move_with_the_rewards(seed: int, shift: float) -> None:
    rows = some_rows(20, seed)
    moved = EvaluationRows(rows.importance_weight, rows.reward + shift)
    got = e.SNIPS().estimate(moved).value - e.SNIPS().estimate(rows).value
    assert got == pytest.approx(shift, abs=1e-11)


def test_zero_weights_are_fine_where_others_are_positive() -> None:
    rows = EvaluationRows([0.0, 0.0, 3.0], [1.0, 0.0, 1.0], [0.5] * 3, [0.5] * 3)
    for estimator in ALL[:-1]:
        assert np.isfinite(estimator.estimate(rows).value)
    assert e.SubGaussianIPS(lambda_=1.0).weight(np.array([0.0]))[0] == 0.0


def test_cluster_weights() -> None:
    world = OneContext(6)
    cluster = np.array([0, 0, 1, 1, 2, 2])
    action = np.array([0, 3, 5])
    n = action.size
    target, behavior = np.tile(world.target, (n, 1)), np.tile(world.behavior, (n, 1))
    got = e.cluster_weight(target, behavior, cluster, action)
    expected = [
        world.target[[2 * c, 2 * c + 1]].sum() / world.behavior[[2 * c, 2 * c + 1]].sum()
        for c in (0, 1, 2)
    ]
    assert got == pytest.approx(expected)
    own = e.cluster_weight(target, behavior, np.arange(6), action)
    assert own == pytest.approx(world.weight[action])
    with pytest.raises(OfftowerError, match="cluster of row 0"):
        e.cluster_weight(target, 0.0 * behavior, cluster, action)


def test_marginalised_ips_is_unbiased_where_clusters_share_rewards() -> None:
    """50,000 rows, 5 standard errors; and less variance than IPS."""
    world, rng = OneContext(20), np.random.default_rng(1)
    cluster = np.arange(20) // 5
    q = np.array([0.1, 0.3, 0.6, 0.8])[cluster]
    action = np.searchsorted(world.cumulative, rng.random(50_000))
    reward = (rng.random(50_000) < q[action]) * 1.0
    target = np.bincount(cluster, world.target) / np.bincount(cluster, world.behavior)
    rows = EvaluationRows(world.weight[action], reward, cluster_weight=target[cluster[action]])
    marginal, plain = e.MIPS().estimate(rows), e.IPS().estimate(rows)
    assert abs(marginal.value - world.target @ q) < 5 * marginal.std_error
    assert marginal.std_error < plain.std_error


@by_label
def test_no_rows_and_one_row(estimator: e.Estimator) -> None:
    rows = some_rows()
    with pytest.raises(OfftowerError, match="there are no rows to estimate from"):
        estimator.estimate(rows.take(slice(0, 0)))
    single = estimator.estimate(rows.take(slice(0, 1)))
    assert np.isfinite(single.value) and np.isnan(single.std_error) and single.n == 1
    with pytest.raises(OfftowerError, match="at least two rows; there is 1"):
        estimator.interval(rows.take(slice(0, 1)))


@by_label
def test_a_log_without_support_is_refused(estimator: e.Estimator) -> None:
    rows = some_rows()
    none = EvaluationRows(
        np.zeros(50), rows.reward, rows.action_reward, rows.expected_reward,
        cluster_weight=np.zeros(50),
    )  # fmt: skip
    if not estimator.uses_weight:
        assert estimator.estimate(none).value == pytest.approx(rows.expected_reward.mean())
        return
    for call in (estimator.estimate, estimator.interval, estimator.contributions):
        with pytest.raises(OfftowerError, match="every importance weight is 0"):
            call(none)


def test_missing_columns_are_named() -> None:
    rows = EvaluationRows([1.0, 2.0], [0.0, 1.0])
    for estimator in ALL:
        if estimator.needs_reward_model:
            with pytest.raises(OfftowerError, match=f"{estimator.label} needs a reward model"):
                estimator.estimate(rows)
    with pytest.raises(OfftowerError, match="mips needs cluster_weight"):
        e.MIPS().estimate(rows)
    with pytest.raises(OfftowerError, match="log_smoothing needs rewards that are not negative"):
        e.LogSmoothing(lambda_=0.1).estimate(EvaluationRows([1.0, 2.0], [0.0, -1.0]))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("cliped_ips", {}, "unknown estimator 'cliped_ips'; did you mean 'clipped_ips'"),
        ("clipped_ips", {}, "clipped_ips takes max_weight; given: nothing"),
        ("ips", {"lambda_": 1.0}, "ips takes no parameters; given: lambda_"),
        ("clipped_ips", {"max_weight": -1.0}, r"max_weight must be a number in \[0, inf\]"),
        ("dros", {"shrinkage": np.nan}, "shrinkage must be a number"),
        ("sub_gaussian_ips", {"lambda_": 1.5}, r"number in \[0, 1\], but is 1.5"),
        ("sub_gaussian_dr", {"lambda_": "x"}, "but is 'x'"),
    ],
)
def test_registry_errors(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(OfftowerError, match=message):
        e.make_estimator(name, **parameters)


def test_the_registry_makes_every_estimator() -> None:
    every = [*ALL, *OF_LOGGERS]
    assert set(e.ESTIMATORS) == {estimator.label for estimator in every}
    for estimator in every:
        parameters = {k: getattr(estimator, k) for k in estimator.parameters()}
        assert e.make_estimator(estimator.label, **parameters) == estimator
    assert e.ClippedIPS(max_weight=10.0).name == "clipped_ips(max_weight=10)"


def test_paired_rows_must_be_the_same_rows() -> None:
    rows = some_rows()
    pair = e.Difference(e.IPS(), e.IPS())
    with pytest.raises(DataError, match="one has 50, the other 49"):
        pair.statistics(rows, rows.take(slice(0, 49)))
    with pytest.raises(DataError, match=r"but row\[0\] is 0 for one and 49 for the other"):
        pair.statistics(rows, rows.take(slice(None, None, -1)))


# --- SLOPE


def test_slope_follows_its_rule() -> None:
    make = e.Estimate
    ladder = [make(1.0, 0.5, 9), make(0.9, 0.2, 9), make(0.6, 0.1, 9), make(-2.0, 0.01, 9)]
    assert e.slope_choice(ladder) == 2
    assert e.slope_choice(ladder[:1]) == 0
    assert e.slope_choice([make(0.0, 0.1, 9), make(1.0, 0.1, 9), make(0.0, 0.0, 9)]) == 0
    with pytest.raises(OfftowerError, match="at least one"):
        e.slope_choice([])


TUNABLE = [e.ClippedIPS, e.ClippedDR, e.SwitchDR, e.DRos, e.SubGaussianIPS, e.SubGaussianDR]


@pytest.mark.parametrize("kind", [*TUNABLE, e.LogSmoothing], ids=lambda x: x.label)
def test_tuning_goes_from_little_to_much_bias(kind: type[e.Estimator]) -> None:
    world = OneContext(200)
    rows = world.sample(3000, np.random.default_rng(5))
    tuning = e.tune(kind, rows)
    errors = [estimate.std_error for estimate in tuning.estimates]
    assert errors[0] == max(errors) and errors[-1] < errors[0]
    plain = e.DR() if kind.needs_reward_model else e.IPS()
    assert tuning.estimates[0].value == pytest.approx(plain.estimate(rows).value, rel=0.01)
    # The choice is not contradicted by the unbiased end beyond what SLOPE allows.
    chosen = tuning.estimates[tuning.chosen]
    gap = abs(chosen.value - tuning.estimates[0].value)
    assert gap <= 2 * (chosen.std_error + 1.45 * errors[0])
    assert tuning.to_dict()["chosen"] == tuning.estimator.name


def test_slope_clips_hard_when_clipping_does_not_hurt() -> None:
    """Rewards of 0 under heavy weights: clipping them costs nothing, and SLOPE goes far."""
    rng = np.random.default_rng(2)
    rows = EvaluationRows(rng.pareto(1.1, 2000), np.zeros(2000))
    tuning = e.tune(e.ClippedIPS, rows)
    assert tuning.chosen == len(tuning.ladder) - 1
    with pytest.raises(OfftowerError, match="ips has no parameter"):
        e.tune(e.IPS, rows)


def test_weights_near_the_largest_number_do_not_overflow() -> None:
    """The value of self-normalized weights does not depend on their scale."""
    large = EvaluationRows(np.full(2, 1e308), np.array([1.0, 0.0]))
    small = EvaluationRows(np.ones(2), np.array([1.0, 0.0]))
    found, wanted = e.SNIPS().estimate(large), e.SNIPS().estimate(small)
    assert (found.value, found.std_error) == (wanted.value, wanted.std_error) == (0.5, 0.5)
    ends = [e.SNIPS().interval(rows) for rows in (large, small)]
    assert ends[0] == ends[1]
    # Sums of shards have no common scale: an overflow gives no value, not 0.
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isnan(e.SNIPS().combine(e.SNIPS().statistics(large).mean))


def test_an_overflow_of_second_moments_is_an_infinite_error() -> None:
    rows = EvaluationRows(np.array([3e200, 1e200, 2e200]), np.array([1.0, 0.0, 1.0]))
    with np.errstate(over="ignore", invalid="ignore"):
        assert e.IPS().estimate(rows).std_error == np.inf
