"""Diagnostics against their definitions, known tails, and shards."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest

from offtower.errors import DataError, OfftowerError
from offtower.evaluation import EvaluationRows, support_probe
from offtower.evaluation.decision.calibration import CalibrationSums
from offtower.evaluation.decision.weights import WeightSums, pareto_shape

from .one_context import OneContext
from .test_estimators import some_rows


def test_weights_by_definition() -> None:
    rows = some_rows(5000)
    w = rows.importance_weight
    got = WeightSums.of(rows).finish()
    assert got.effective_sample_size == pytest.approx(w.sum() ** 2 / np.sum(w**2))
    assert got.effective_share == pytest.approx(got.effective_sample_size / 5000)
    assert got.mean == pytest.approx(w.mean())
    assert got.mean_std_error == pytest.approx(w.std(ddof=1) / np.sqrt(5000))
    assert got.mean_z == pytest.approx((w.mean() - 1) / got.mean_std_error)
    assert got.max == w.max() and got.zero_share == 0.0
    assert got.top_share == pytest.approx(np.sort(w)[-5:].sum() / w.sum())
    assert rows.action_reward is not None and rows.expected_reward is not None
    balance = w * (rows.action_reward - rows.expected_reward)
    assert got.balance == pytest.approx(balance.mean())
    assert got.balance_std_error == pytest.approx(balance.std(ddof=1) / np.sqrt(5000))


def test_shards_give_the_same_diagnostics() -> None:
    rows = some_rows(3000)
    parts = [rows.take(slice(i, i + 700)) for i in range(0, 3000, 700)]
    whole = WeightSums.of(rows).finish().to_dict()
    merged = reduce(WeightSums.merge, map(WeightSums.of, parts[::-1])).finish().to_dict()
    assert merged == pytest.approx(whole, rel=1e-10)
    first = CalibrationSums.of(rows)
    others = [CalibrationSums.of(part) for part in parts]
    assert first is not None
    whole, merged = first.finish().to_dict(), reduce(_merge, others).finish().to_dict()
    for one, other in zip(whole.pop("bins"), merged.pop("bins"), strict=True):
        assert other == pytest.approx(one, rel=1e-9)
    assert merged == pytest.approx(whole, rel=1e-9)


def _merge(a: CalibrationSums, b: CalibrationSums) -> CalibrationSums:
    return a.merge(b)


def test_only_the_largest_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offtower.evaluation.decision.weights.KEPT_WEIGHTS", 400)
    rows = some_rows(3000)
    parts = [WeightSums.of(rows.take(slice(i, i + 1000))) for i in (0, 1000, 2000)]
    merged = reduce(WeightSums.merge, parts)
    assert merged.top.size == 400
    assert np.array_equal(np.sort(merged.top), np.sort(rows.importance_weight)[-400:])
    monkeypatch.undo()
    assert merged.finish().pareto_k == pytest.approx(WeightSums.of(rows).finish().pareto_k)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_shape_of_known_tails(k: float) -> None:
    """Generalized Pareto weights: mean of 20 estimates within .1; the prior pulls towards .5."""
    rng = np.random.default_rng(3)
    got = [pareto_shape((rng.random(20_000) ** -k - 1.0) / k, 20_000) for _ in range(20)]
    assert np.mean(got) == pytest.approx(k, abs=0.1)


def test_pareto_shape_of_light_and_of_no_tails() -> None:
    rng = np.random.default_rng(4)
    uniform = pareto_shape(rng.random(5000), 5000)
    assert uniform is not None and uniform < 0.0
    assert pareto_shape(np.ones(5000), 5000) is None
    assert pareto_shape(rng.random(10), 10) is None
    world = OneContext(10)
    assert WeightSums.of(world.sample(5000, rng)).finish().pareto_k is None


def test_degenerate_weights() -> None:
    rows = EvaluationRows(np.zeros(10), np.ones(10))
    got = WeightSums.of(rows).finish()
    assert (got.effective_sample_size, got.top_share, got.max) == (0.0, 0.0, 0.0)
    assert got.mean == 0.0 and got.mean_z is None and got.zero_share == 1.0
    with pytest.raises(OfftowerError, match="no rows"):
        WeightSums.of(rows.take(slice(0, 0))).finish()


def test_wrong_propensities_show() -> None:
    """True ones stay within 4.5 sigma; ones too small by a tenth, or wrong by item, do not."""
    world, rng = OneContext(50), np.random.default_rng(5)
    rows = world.sample(50_000, rng)
    good = WeightSums.of(rows).finish()
    assert abs(good.mean_z or 9.0) < 4.5 and abs(good.balance_z or 9.0) < 4.5
    q, m = rows.action_reward, rows.expected_reward
    scaled = EvaluationRows(rows.importance_weight / 0.9, rows.reward, q, m)
    assert (WeightSums.of(scaled).finish().mean_z or 0.0) > 8.0
    # Weights right on average, and wrong between items of high and low predicted reward.
    assert q is not None
    tilt = 1.0 + 0.3 * np.sign(q - np.average(q, weights=rows.importance_weight))
    tilted = rows.importance_weight * tilt
    tilted *= rows.importance_weight.sum() / tilted.sum()
    assert (WeightSums.of(EvaluationRows(tilted, rows.reward, q, m)).finish().balance_z or 0) > 8.0


def test_calibration_by_definition() -> None:
    rng = np.random.default_rng(6)
    q = rng.choice(np.linspace(0.05, 0.95, 10), 20_000)
    weight = rng.exponential(size=20_000)
    reward = (rng.random(20_000) < 0.8 * q) * 1.0
    sums = CalibrationSums.of(EvaluationRows(weight, reward, q, q))
    assert sums is not None
    got = sums.finish()
    assert got.bias == pytest.approx((reward - q).mean())
    assert got.bias_std_error == pytest.approx((reward - q).std(ddof=1) / np.sqrt(20_000))
    assert got.weighted_bias == pytest.approx(np.sum(weight * (reward - q)) / weight.sum())
    assert got.slope == pytest.approx(np.polyfit(q, reward, 1)[0])
    assert got.slope == pytest.approx(0.8, abs=0.05)
    assert sum(b.n for b in got.bins) == 20_000
    assert [b.predicted for b in got.bins] == sorted(b.predicted for b in got.bins)
    for one in got.bins:
        assert one.std_error is not None
        assert abs(one.observed - 0.8 * one.predicted) < 5 * one.std_error
    assert got.error == pytest.approx(0.2 * q.mean(), abs=0.02)


def test_calibration_of_small_and_negative_predictions() -> None:
    """Click rates of a few per mille get bins of their own, not one that holds them all."""
    rng = np.random.default_rng(7)
    q = rng.lognormal(-6.0, 0.7, 10_000) * rng.choice([-1.0, 1.0], 10_000)
    sums = CalibrationSums.of(EvaluationRows(np.ones(10_000), q, q, q))
    assert sums is not None
    got = sums.finish()
    assert len(got.bins) == 10 and min(b.n for b in got.bins) > 800
    assert got.error == pytest.approx(0.0, abs=1e-15)
    assert got.slope == pytest.approx(1.0)
    assert CalibrationSums.of(EvaluationRows([1.0], [1.0])) is None


def test_constant_predictions_have_no_slope() -> None:
    sums = CalibrationSums.of(EvaluationRows([1.0, 1.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]))
    assert sums is not None
    got = sums.finish()
    assert got.slope is None and got.error == 0.0 and len(got.bins) == 1


def test_items_below_what_the_log_can_show_are_hidden() -> None:
    """Two contexts, target certain of its item: the share whose weight exceeds the rows."""
    got = support_probe([0.02, 0.0, 0.009, 0.01], [1.0, 1.0, 1.0, 1.0], num_rows=100)
    assert got.missing == 0.25 and got.hidden == 0.5
    assert support_probe([0.02]).hidden is None
    # A near-uniform target over a large catalogue is not hidden by a near-uniform log.
    assert support_probe([1e-6], [1.5e-6], num_rows=1000).hidden == 0.0


def test_support_probe() -> None:
    got = support_probe(np.concatenate([np.zeros(5), np.full(95, 0.02)]))
    assert (got.draws, got.missing, got.least) == (100, 0.05, 0.02)
    # Clopper and Pearson's interval of 5 in 100.
    assert (got.low, got.high) == pytest.approx((0.0164, 0.1128), abs=1e-4)
    full = support_probe([0.1, 0.2])
    assert (full.missing, full.low, full.least) == (0.0, 0.0, 0.1) and full.high < 1.0
    none = support_probe([0.0])
    assert (none.missing, none.high, none.least) == (1.0, 1.0, None)
    with pytest.raises(DataError, match="at least one item"):
        support_probe([])
    with pytest.raises(DataError, match="same 2 items"):
        support_probe([0.1, 0.2], [0.1], num_rows=5)
    for bad in ([1.5], [-0.1], [np.nan]):
        with pytest.raises(DataError, match="numbers from 0 to 1"):
            support_probe(bad)
