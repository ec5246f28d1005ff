"""Each estimator's mean and variance against exact sums, one context, 10 to 1,000,000 actions."""

from __future__ import annotations

import numpy as np
import pytest

from offtower.evaluation import estimators as e

from .one_context import OneContext

LAMBDA, CLIP, SHRINK, RATE = 0.3, 1.5, 4.0, 0.2


def weighted(world: OneContext, f: np.ndarray) -> tuple[float, float]:
    """Mean and variance of f r, r binary."""
    mean = np.sum(world.behavior * f * world.q)
    return mean, np.sum(world.behavior * f**2 * world.q) - mean**2


def modeled(world: OneContext, f: np.ndarray) -> tuple[float, float]:
    """Mean and variance of f (r - model) + E_pi_e model."""
    gap = world.q - world.model
    mean = np.sum(world.behavior * f * gap)
    square = world.q * (1.0 - world.model) ** 2 + (1.0 - world.q) * world.model**2
    return (
        mean + world.modeled_value,
        np.sum(world.behavior * f**2 * square) - mean**2,
    )


def exact(world: OneContext, estimator: e.Estimator) -> tuple[float, float]:
    """Value in the limit of n, and n times the variance, by hand."""
    w, pb, q = world.weight, world.behavior, world.q
    if estimator.label == "log_smoothing":
        f = np.log1p(RATE * w) / RATE  # log(1 + lambda w r) is 0 for r = 0
        return weighted(world, f)
    if estimator.label == "snips":
        v = world.value
        return v, np.sum(pb * w**2 * (q * (1 - v) ** 2 + (1 - q) * v**2))
    if estimator.label == "sndr":
        shift = np.sum(pb * w * (q - world.model))
        residual = world.model + shift
        spread = q * (1 - residual) ** 2 + (1 - q) * residual**2
        return world.value, np.sum(pb * w**2 * spread)
    maps = {
        "ips": w,
        "clipped_ips": np.minimum(w, CLIP),
        "sub_gaussian_ips": w / (1 - LAMBDA + LAMBDA * w),
        "dm": 0.0 * w,
        "dr": w,
        "clipped_dr": np.minimum(w, CLIP),
        "switch_dr": w * (w <= CLIP),
        "dros": SHRINK * w / (w**2 + SHRINK),
        "sub_gaussian_dr": w / (1 - LAMBDA + LAMBDA * w),
    }
    f = maps[estimator.label]
    return (modeled if estimator.needs_reward_model else weighted)(world, f)


ALL = [
    e.IPS(),
    e.ClippedIPS(max_weight=CLIP),
    e.SNIPS(),
    e.DM(),
    e.DR(),
    e.ClippedDR(max_weight=CLIP),
    e.SNDR(),
    e.SwitchDR(threshold=CLIP),
    e.DRos(shrinkage=SHRINK),
    e.SubGaussianIPS(lambda_=LAMBDA),
    e.SubGaussianDR(lambda_=LAMBDA),
    e.LogSmoothing(lambda_=RATE),
]


@pytest.mark.parametrize("items", [10, 1000, 1_000_000])
@pytest.mark.parametrize("estimator", ALL, ids=lambda x: x.label)
def test_mean_and_variance_are_the_exact_sums(estimator: e.Estimator, items: int) -> None:
    world = OneContext(items)
    rows, chance = world.outcomes()
    terms = estimator.terms(rows)
    mean = chance @ terms
    influence = (terms - mean) @ estimator.gradient(mean)
    value, variance = exact(world, estimator)
    assert float(estimator.combine(mean)) == pytest.approx(value, rel=1e-11)
    assert float(chance @ influence**2) == pytest.approx(variance, rel=1e-9, abs=1e-15)


def test_the_consistent_ones_are_the_ones_whose_limit_is_the_value() -> None:
    world = OneContext(1000)
    for estimator in ALL:
        value, _ = exact(world, estimator)
        assert (abs(value - world.value) < 1e-12) == estimator.consistent, estimator.label


@pytest.mark.parametrize("items", [10, 1000])
def test_simulated_logs_agree_with_the_exact_moments(items: int) -> None:
    """400 logs of 1,000 rows. Mean and variance each at 4.5 sigma: 24 checks, error below 2e-4.

    The ratio estimators are biased by O(1/n), and their variance is exact up to O(1/n).
    """
    world, rng, n, logs = OneContext(items), np.random.default_rng(7), 1000, 400
    values = {x.label: np.empty(logs) for x in ALL}
    errors = {x.label: np.empty(logs) for x in ALL}
    for i in range(logs):
        rows = world.sample(n, rng)
        for estimator in ALL:
            estimate = estimator.estimate(rows)
            values[estimator.label][i] = estimate.value
            errors[estimator.label][i] = estimate.std_error
    for estimator in ALL:
        value, variance = exact(world, estimator)
        seen = values[estimator.label]
        sigma = np.sqrt(variance / n)
        if estimator.label == "dm":
            assert np.allclose(seen, value, rtol=1e-12)
            continue
        assert abs(seen.mean() - value) < 4.5 * sigma / np.sqrt(logs) + 2.0 * variance / n
        # The variance of 400 values has a relative standard deviation of sqrt(2 / 399) = 7 %.
        assert seen.var(ddof=1) == pytest.approx(variance / n, rel=4.5 * 0.071)
        assert errors[estimator.label].mean() == pytest.approx(sigma, rel=0.05)


def test_a_million_actions() -> None:
    """One log of 200,000 rows: values within 5 standard errors (12 checks, error below 1e-5)."""
    world = OneContext(1_000_000)
    rows = world.sample(200_000, np.random.default_rng(3))
    for estimator in ALL:
        value, variance = exact(world, estimator)
        estimate = estimator.estimate(rows)
        sigma = np.sqrt(variance / rows.n)
        assert abs(estimate.value - value) <= 5.0 * sigma + 1e-12
        assert estimate.std_error == pytest.approx(sigma, rel=0.05, abs=1e-12)
