"""The exact split: against brute force, its optimality conditions, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from offtower.errors import OfftowerError
from offtower.evaluation.selection import SelectionLog
from offtower.evaluation.selection.exact import fit_draws, fit_pooled, solve_multiplier
from offtower.evaluation.selection.log import importance_weights


def policies(seed: int, n: int, items: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(items), n), rng.dirichlet(np.full(items, 1.0 / spread), n)


def fit_split(behavior: np.ndarray, target: np.ndarray, share: float = 0.2) -> np.ndarray:
    weight = importance_weights(behavior, target)
    return solve_multiplier(weight, behavior, share).apply(weight)


def pseudo_weight(rho: np.ndarray, p: float) -> np.ndarray:
    return rho * (1.0 - p) / ((1.0 - rho) * p)


def loss(rho: np.ndarray, behavior: np.ndarray, weight: np.ndarray, share: float) -> float:
    return float((behavior * (pseudo_weight(rho, share) - weight) ** 2).sum())


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("items", [2, 3, 4])
def test_no_optimizer_finds_a_better_split(items: int, share: float) -> None:
    rng = np.random.default_rng(items)
    behavior, target = policies(items, 1, items, spread=3.0)
    rho = fit_split(behavior, target, share)[0]
    weight = (target / behavior)[0]
    best = np.inf
    for _ in range(15):
        found = minimize(
            loss,
            rng.uniform(0.02, 0.98, items),
            args=(behavior[0], weight, share),
            bounds=[(1e-9, 1 - 1e-9)] * items,
            constraints={"type": "eq", "fun": lambda r: behavior[0] @ r - share},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        if found.success:
            best = min(best, found.fun)
    ours = loss(rho, behavior[0], weight, share)
    assert ours == pytest.approx(best, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("spread", [1.0, 5.0, 100.0])
def test_constraint_and_stationarity(spread: float) -> None:
    share = 0.2
    behavior, target = policies(1, 300, 12, spread)
    rho = fit_split(behavior, target, share)
    assert np.all((rho > 0.0) & (rho < 1.0))
    np.testing.assert_allclose((behavior * rho).sum(axis=1), share, rtol=0, atol=1e-12)
    # (v - w)(1 - k + k v)^2 is the same number for all items of a context
    v, w = pseudo_weight(rho, share), target / behavior
    u = 1.0 - share + share * v
    t = share * (v - w) * u**2
    scale = np.maximum(
        1.0, share * w.max(axis=1, keepdims=True) * (u**2).max(axis=1, keepdims=True)
    )
    assert np.all(np.ptp(t / scale, axis=1) < 1e-9)
    assert np.all(v >= w * (1.0 - 1e-12))


def test_identical_policies_give_the_share_and_weight_one() -> None:
    behavior, _ = policies(2, 200, 7)
    for share in (0.1, 0.2, 0.7):
        rho = fit_split(behavior, behavior, share)
        np.testing.assert_allclose(rho, share, rtol=0, atol=1e-14)
        np.testing.assert_allclose(pseudo_weight(rho, share), 1.0, rtol=1e-13)


def test_renumbering_and_reordering_change_nothing() -> None:
    behavior, target = policies(3, 100, 9, 4.0)
    rng = np.random.default_rng(0)
    items, rows = rng.permutation(9), rng.permutation(100)
    rho = fit_split(behavior, target)
    np.testing.assert_allclose(
        fit_split(behavior[:, items], target[:, items]), rho[:, items], rtol=1e-11
    )
    np.testing.assert_array_equal(fit_split(behavior[rows], target[rows]), rho[rows])
    np.testing.assert_array_equal(fit_split(behavior, target), rho)


def test_items_without_behavior_mass_and_target_outside_the_support() -> None:
    behavior = np.array([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])
    target = np.array([[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    rho = fit_split(behavior, target)
    assert np.all(np.isfinite(rho))
    np.testing.assert_allclose((behavior * rho).sum(axis=1), 0.2, atol=1e-12)


def test_extreme_weights() -> None:
    behavior = np.array([[1e-9, 1.0 - 1e-9]])
    rho = fit_split(behavior, behavior[:, ::-1])
    assert np.all(np.isfinite(rho)) and rho[0, 0] > 0.999
    np.testing.assert_allclose((behavior * rho).sum(), 0.2, atol=1e-12)


def test_fits_better_than_a_random_split() -> None:
    behavior, target = policies(4, 200, 10, 2.0)
    w = target / behavior
    rho = fit_split(behavior, target)
    error = (behavior * (pseudo_weight(rho, 0.2) - w) ** 2).sum()
    assert error < 0.3 * (behavior * (1.0 - w) ** 2).sum()


def test_draws_approach_the_exact_split() -> None:
    rng = np.random.default_rng(5)
    behavior, target = policies(5, 40, 10)
    weight = target / behavior
    drawn = (rng.random((40, 20_000, 1)) > behavior.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
    logged = drawn[:, 0]
    rows = np.arange(40)
    rho, at_draws = fit_draws(
        weight[rows, logged], np.take_along_axis(weight, drawn[:, 1:], axis=1), 0.2
    )
    exact = fit_split(behavior, target)[rows, logged]
    np.testing.assert_allclose(rho, exact, atol=0.02)
    np.testing.assert_allclose(at_draws.mean(axis=1), 0.2, atol=1e-9)


def test_draws_that_overshoot_are_scaled_to_the_share() -> None:
    weight = np.full((3, 100), 2.0)  # mean weight 2: noise that E[rho] = k does not allow
    rho, at_draws = fit_draws(np.ones(3), weight, 0.2)
    np.testing.assert_allclose(at_draws, 0.2, atol=1e-9)
    assert np.all(rho < 0.2)


@pytest.mark.parametrize("draws", [1, 2, 99])
def test_few_draws_are_refused(draws: int) -> None:
    with pytest.raises(OfftowerError, match="draw"):
        fit_draws(np.ones(5), np.ones((5, draws)), 0.2)


def test_draws_that_are_no_weights_are_refused() -> None:
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(OfftowerError, match="negative or not finite"):
            fit_draws(np.ones(5), np.full((5, 100), wrong), 0.2)


def test_pooled_multiplier_keeps_the_mean_share() -> None:
    weight = np.random.default_rng(6).lognormal(-0.5, 1.0, 1000)
    rho = fit_pooled(weight, 0.2)
    assert rho.mean() == pytest.approx(0.2, abs=1e-12)
    order = np.argsort(weight)
    assert np.all(np.diff(rho[order]) >= 0.0)
    np.testing.assert_allclose(fit_pooled(np.ones(10), 0.2), 0.2, atol=1e-14)


@pytest.mark.parametrize(
    ("behavior", "target", "message"),
    [
        (np.full((2, 2), 0.5), np.full((2, 3), 1 / 3), "shape"),
        (np.full((2, 2), 0.4), np.full((2, 2), 0.5), "sums to"),
        (np.full((2, 2), 0.5), np.array([[0.5, 0.5], [np.nan, 1.0]]), "non-finite"),
    ],
)
def test_bad_input_is_named(behavior: np.ndarray, target: np.ndarray, message: str) -> None:
    with pytest.raises(OfftowerError, match=message):
        SelectionLog.from_policies([0, 0], [0.0, 1.0], behavior, target)
