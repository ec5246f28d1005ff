"""Bounds on mean rewards and weights by day: their validity at all readings, and their power."""

from __future__ import annotations

import numpy as np
import pytest

from offtower.monitoring.days import DaySums, WeightSums, share_of_day

READINGS = (5, 40, 300)


def weights(rng: np.random.Generator, n: int) -> np.ndarray:
    """Of mean 1: 0.2 with probability 0.8, else 4.2."""
    return np.where(rng.random(n) < 0.8, 0.2, 4.2)


def test_bounds_of_the_mean_weight_hold_at_all_readings() -> None:
    rng, trials, delta, wrong = np.random.default_rng(0), 150, 0.2, 0
    for _ in range(trials):
        drawn, sums, before = weights(rng, READINGS[-1]), None, 0
        missed = False
        for reading in READINGS:
            part = WeightSums.of(drawn[before:reading], 5.0)
            sums, before = part if sums is None else sums.merge(part), reading
            low, high = sums.bounds(delta)
            assert high is not None
            missed |= low > 1.0 or high < 1.0
        wrong += missed
    assert wrong <= trials * delta + 4.0 * (trials * delta * (1.0 - delta)) ** 0.5


def test_bounds_of_the_value_hold_at_all_readings() -> None:
    rng, trials, delta, wrong = np.random.default_rng(1), 150, 0.2, 0
    for _ in range(trials):
        drawn, sums, before, missed = rng.beta(1.0, 4.0, READINGS[-1]), None, 0, False
        for reading in READINGS:
            part = DaySums.of(reading - before, drawn[before:reading], (0.0, 1.0))
            sums, before = part if sums is None else sums.merge(part), reading
            low, high = sums.bounds(delta)
            missed |= not low <= 0.2 <= high
        wrong += missed
    assert wrong <= trials * delta + 4.0 * (trials * delta * (1.0 - delta)) ** 0.5


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_wrong_propensities_are_found(factor: float) -> None:
    sums = WeightSums.of(factor * weights(np.random.default_rng(2), 20_000), 10.0)
    low, high = sums.bounds(0.01)
    assert high is not None and (high < 0.9 if factor < 1.0 else low > 1.1)
    assert abs(sums.mean - factor) < 0.03


def test_a_weight_above_the_largest_withdraws_the_upper_bound() -> None:
    sums = WeightSums.of(np.array([0.5, 0.5, 3.0]), 2.0)
    assert sums.bounds(0.1)[1] is None and sums.bounds(0.1)[0] < 1.0


def test_the_value_has_the_range_of_rewards() -> None:
    sums = DaySums.of(4, np.array([-2.0, 6.0]), (-2.0, 6.0))
    low, high = sums.bounds(0.05)
    assert sums.mean == 2.0 and -2.0 <= low < 2.0 < high <= 6.0


def test_days_share_the_error() -> None:
    assert abs(sum(share_of_day(k) for k in range(1, 10_000)) - 1.0) < 1.01e-4
