"""The sensitivity bound, against linear programs solved by trying every split and by search."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from offtower.evaluation import EvaluationRows
from offtower.evaluation.decision.sensitivity import MOST, SensitivitySums
from offtower.evaluation.evaluate import evaluate_rows


def rows(n: int, seed: int, *, binary: bool = True) -> EvaluationRows:
    rng = np.random.default_rng(seed)
    reward = (rng.random(n) < 0.4) * 1.0 if binary else rng.integers(0, 1024, n) / 1023.0
    return EvaluationRows(importance_weight=rng.lognormal(0.0, 0.7, n), reward=reward)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 1.3, 4.0])
def test_bounds_are_those_over_all_vertices(binary: bool, gamma: float) -> None:
    """A ratio of linear functions takes its extremes at vertices: all 2^9 are enumerated."""
    one = rows(9, 3, binary=binary)
    w, r = one.importance_weight, one.reward
    values = [
        (np.array(factor) * w * r).sum() / (np.array(factor) * w).sum()
        for factor in product((1.0 / gamma, gamma), repeat=9)
    ]
    low, high = SensitivitySums.of(one, (0.0, 1.0)).bounds(gamma)
    assert low == pytest.approx(min(values), rel=1e-12)
    assert high == pytest.approx(max(values), rel=1e-12)


def test_shards_merge() -> None:
    one = rows(1000, 0)
    whole = SensitivitySums.of(one, (0.0, 1.0))
    parts = [
        SensitivitySums.of(one.take(slice(a, a + 250)), (0.0, 1.0)) for a in range(0, 1000, 250)
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    np.testing.assert_allclose(merged.bounds(2.0), whole.bounds(2.0), rtol=1e-12)


@pytest.mark.parametrize(("logging", "side"), [(0.2, "above"), (0.7, "below")])
def test_the_factor_is_where_the_bound_meets_the_threshold(logging: float, side: str) -> None:
    sums = SensitivitySums.of(rows(4000, 1), (0.0, 1.0))
    factor = sums.largest_factor(logging, half_width=0.02, margin=0.01)
    assert factor is not None and 1.0 < factor < MOST
    low, high = sums.bounds(factor)
    met = low - 0.02 if side == "above" else high + 0.02
    assert met == pytest.approx(logging + 0.01, abs=1e-9)


def test_binary_rewards_have_a_closed_form() -> None:
    """With share p of the weight rewarded, the least value is p / (p + g^2 (1 - p))."""
    one = rows(4000, 2)
    p = float((one.importance_weight * one.reward).sum() / one.importance_weight.sum())
    sums = SensitivitySums.of(one, (0.0, 1.0))
    threshold = p / 2
    factor = np.sqrt(p * (1 - threshold) / (threshold * (1 - p)))
    assert sums.largest_factor(threshold, 0.0, 0.0) == pytest.approx(factor, rel=1e-9)


def test_a_side_that_is_not_certain_has_no_factor() -> None:
    sums = SensitivitySums.of(rows(4000, 1), (0.0, 1.0))
    value, _ = sums.bounds(1.0)
    assert sums.largest_factor(value, 0.01, 0.0) is None


def test_it_is_reported_with_estimated_propensities_only() -> None:
    rng = np.random.default_rng(4)
    reward = (rng.random(5000) < 0.3) * 1.0
    weight = np.where(reward > 0.0, 1.4, 0.83) * rng.uniform(0.9, 1.1, 5000)
    one = {"p": EvaluationRows(importance_weight=weight, reward=reward)}
    known = evaluate_rows(one, ["snips"], reward_range=(0.0, 1.0))
    assert known.policies["p"].sensitivity is None
    found = evaluate_rows(one, ["snips"], reward_range=(0.0, 1.0), propensities_estimated=True)
    factor = found.policies["p"].sensitivity
    assert factor is not None and 1.0 < factor < 2.0
    assert f"{factor:.3g}" in next(
        reason.message
        for reason in found.policies["p"].verdict.reasons
        if reason.code == "sensitivity"
    )
    assert found.to_dict()["policies"]["p"]["sensitivity"] == factor
