"""Rows with known weights: repeated rows, enumeration, formulas in float64, a down-sampled log."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offtower.errors import DataError, OfftowerError
from offtower.evaluation import EvaluationRows, evaluate_rows
from offtower.evaluation import estimators as e
from offtower.evaluation.decision.calibration import CalibrationSums
from offtower.evaluation.decision.weights import WeightSums
from offtower.evaluation.estimators import Difference, MeanReward
from offtower.evaluation.estimators.base import Estimator
from offtower.evaluation.intervals.methods import bootstrap_interval

ESTIMATORS: tuple[Estimator, ...] = (
    e.IPS(),
    e.SNIPS(),
    e.DM(),
    e.DR(),
    e.SNDR(),
    e.ClippedIPS(3.0),
    e.ClippedDR(3.0),
    e.SwitchDR(2.0),
    e.DRos(4.0),
    e.SubGaussianIPS(0.1),
    e.SubGaussianDR(0.1),
    e.LogSmoothing(0.2),
    e.MIPS(),
)


def random_rows(n: int, seed: int = 0, users: bool = False) -> EvaluationRows:
    rng = np.random.default_rng(seed)
    return EvaluationRows(
        rng.exponential(size=n),
        (rng.random(n) < 0.3) * 1.0,
        rng.random(n),
        rng.random(n),
        user=rng.integers(0, n // 4, n) if users else None,
        row=np.arange(n),
        cluster_weight=rng.exponential(size=n),
        row_weight=rng.integers(1, 6, n).astype(float),
    )


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda one: one.label)
def test_a_weight_of_k_counts_as_k_rows(estimator: Estimator) -> None:
    rows = random_rows(200)
    assert rows.row_weight is not None
    repeated = replace(
        rows.take(np.repeat(np.arange(200), rows.row_weight.astype(int))), row_weight=None
    )
    value = estimator.estimate(rows).value
    assert value == pytest.approx(estimator.estimate(repeated).value, rel=1e-12)
    assert estimator.contributions(rows).mean() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda one: one.label)
def test_the_value_and_error_are_the_stated_formula(estimator: Estimator) -> None:
    rows = random_rows(300, seed=1)
    terms, v = estimator.terms(rows), rows.row_weight
    assert v is not None
    mean = v @ terms / v.sum()
    influence = (terms - mean) @ estimator.gradient(mean)
    error = np.sqrt(300 / 299 * np.sum(v**2 * influence**2)) / v.sum()
    found = estimator.estimate(rows)
    assert found.value == pytest.approx(float(estimator.combine(mean)), rel=1e-12)
    assert found.std_error == pytest.approx(error, rel=1e-10)
    # The spread of the contributions gives the same error.
    spread = estimator.contributions(rows).std(ddof=1) / np.sqrt(300)
    assert spread == pytest.approx(error, rel=1e-10)


@pytest.mark.parametrize("users", [False, True])
def test_shards_merge_to_the_whole(users: bool) -> None:
    rows = random_rows(240, seed=2, users=users)
    difference = Difference(e.SNDR(), MeanReward())
    options = {"by_user": users, "replicates": 400, "seed": 3}
    whole = difference.statistics(rows, rows, **options)
    parts = [rows.take(slice(a, a + 60)) for a in range(0, 240, 60)]
    merged = difference.statistics(parts[0], parts[0], **options)
    for part in parts[1:]:
        merged = merged.merge(difference.statistics(part, part, **options))
    for one in (whole, merged):
        assert one.count == rows.row_weight.sum()
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-10)
    ends = [bootstrap_interval(difference, one) for one in (whole, merged)]
    assert ends[0].low == pytest.approx(ends[1].low, rel=1e-10)
    # In any order, and with an empty shard.
    empty = rows.take(slice(0, 0))
    more = difference.statistics(empty, empty, **options).merge(merged)
    np.testing.assert_allclose(more.covariance, whole.covariance, rtol=1e-10)


def test_errors_are_clustered_by_user() -> None:
    rows = random_rows(200, seed=4, users=True)
    assert rows.user is not None and rows.row_weight is not None
    v = rows.row_weight
    terms = e.IPS().terms(rows)[:, 0]
    influence = v * (terms - v @ terms / v.sum())
    total = np.bincount(rows.user, influence)
    groups = len(np.unique(rows.user))
    error = np.sqrt(groups / (groups - 1) * np.sum(total**2)) / v.sum()
    found = e.IPS().finish(e.IPS().statistics(rows, by_user=True))
    assert found.std_error == pytest.approx(error, rel=1e-10)


def world() -> tuple[EvaluationRows, np.ndarray, float]:
    """All (context, item, reward) of a small world as rows, their probabilities, the value."""
    rng = np.random.default_rng(7)
    contexts, items = 4, 3
    p_x = rng.dirichlet(np.ones(contexts))
    logging = rng.dirichlet(np.ones(items), contexts)
    target = rng.dirichlet(np.ones(items), contexts)
    q = rng.random((contexts, items))
    model = rng.random((contexts, items))
    x, a, r = (g.ravel() for g in np.meshgrid(*map(range, (contexts, items, 2)), indexing="ij"))
    probability = p_x[x] * logging[x, a] * np.where(r == 1, q[x, a], 1 - q[x, a])
    rows = EvaluationRows(
        target[x, a] / logging[x, a],
        r.astype(float),
        model[x, a],
        (target * model).sum(axis=1)[x],
    )
    return rows, probability, float(p_x @ (target * q).sum(axis=1))


@pytest.mark.parametrize("estimator", [e.IPS(), e.SNIPS(), e.DR(), e.SNDR()], ids=str)
def test_enumerated_rows_give_the_exact_value(estimator: Estimator) -> None:
    """A log that keeps a share of the rows by reward, weighted by 1 / it, has the whole's value."""
    rows, probability, value = world()
    share = np.where(rows.reward == 1.0, 1.0, 0.05)
    kept = probability * share
    weighted = replace(rows, row_weight=kept / share)
    assert estimator.estimate(weighted).value == pytest.approx(value, rel=1e-12)
    biased = estimator.estimate(replace(rows, row_weight=kept)).value
    assert abs(biased - value) > 0.1


def test_a_down_sampled_log_covers_the_value() -> None:
    """All clicks and a twentieth of the others: 400 logs of about 300 rows.

    z has mean 0 and variance 1 up to the ratio's bias: |mean z| < 0.25 and the variance within
    (0.75, 1.3) are each about 4 standard errors or more (6e-5).
    """
    rows, probability, value = world()
    rng = np.random.default_rng(11)
    share = np.where(rows.reward == 1.0, 1.0, 0.05)
    z = []
    for _ in range(400):
        drawn = rng.choice(rows.n, 600, p=probability)
        drawn = drawn[rng.random(600) < share[drawn]]
        log = replace(rows, row_weight=1.0 / share).take(drawn)
        found = e.IPS().estimate(log)
        z.append((found.value - value) / found.std_error)
    assert abs(np.mean(z)) < 0.25
    assert 0.75 < np.var(z) < 1.3


def test_an_evaluation_reads_the_weights() -> None:
    rows = random_rows(400, seed=5)
    result = evaluate_rows({"a": rows, "b": random_rows(400, seed=5)}, reward_range=(0.0, 1.0))
    v = rows.row_weight
    assert v is not None
    assert result.logging.estimate.value == pytest.approx(v @ rows.reward / v.sum(), rel=1e-12)
    policy = result.policies["a"]
    assert policy.estimates["ips"].estimate.value == pytest.approx(
        v @ (rows.importance_weight * rows.reward) / v.sum(), rel=1e-12
    )
    assert policy.guaranteed_value is None
    combined = v * rows.importance_weight
    assert policy.weights.effective_sample_size == pytest.approx(
        combined.sum() ** 2 / (combined @ combined), rel=1e-12
    )
    assert policy.weights.mean == pytest.approx(combined.sum() / v.sum(), rel=1e-12)
    gap = result.comparisons[0].difference.estimate
    assert (gap.value, gap.std_error) == (0.0, 0.0)


def test_equal_weights_change_no_number() -> None:
    rows = random_rows(500, seed=6)
    plain, doubled = replace(rows, row_weight=None), replace(rows, row_weight=np.full(500, 2.0))
    for estimator in ESTIMATORS:
        one, two = estimator.estimate(plain), estimator.estimate(doubled)
        assert two.value == pytest.approx(one.value, rel=1e-12)
        assert two.std_error == pytest.approx(one.std_error, rel=1e-10)
    sums = [CalibrationSums.of(r) for r in (plain, doubled)]
    assert sums[0] is not None and sums[1] is not None
    one, two = (s.finish() for s in sums)
    assert two.bias == pytest.approx(one.bias) and two.error == pytest.approx(one.error)
    assert WeightSums.of(doubled).finish().max == pytest.approx(WeightSums.of(plain).finish().max)


def test_what_has_no_form_is_refused() -> None:
    rows = random_rows(50)
    for method in ("bernstein", "log_smoothing"):
        with pytest.raises(OfftowerError, match="no form for rows with weights"):
            e.IPS().interval(rows, method=method, reward_range=(0, 1), max_weight=20.0)
    with pytest.raises(DataError, match="expected a number above 0"):
        replace(rows, row_weight=np.zeros(50))
    with pytest.raises(DataError, match="slates cannot have weights"):
        replace(rows, round=np.arange(50))
