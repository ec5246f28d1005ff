"""The network split: its recipe, its invariance to numbering, and what happens when it fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offtower.errors import OfftowerError
from offtower.evaluation.selection import DensePolicies, NetworkOptions, SelectionLog
from offtower.evaluation.selection.network import fit_network
from offtower.evaluation.selection.pasif import pseudo_problem


def world(seed: int = 0, n: int = 200, items: int = 5) -> DensePolicies:
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(n, 3))
    features = rng.normal(size=(items, 3))
    score = context @ features.T
    target = np.exp(score)
    target /= target.sum(axis=1, keepdims=True)
    behavior = np.full((n, items), 1.0 / items)
    return DensePolicies(behavior, target, rng.integers(0, items, n), {}, context, features)


QUICK = NetworkOptions(hidden=32, epochs=150, learning_rate=0.01, penalties=(1.0, 100.0))


def test_learns_the_weights_and_keeps_the_share() -> None:
    w = world()
    rho = fit_network(w, 0.2, QUICK).rho
    p = (w.behavior * rho).sum(axis=1)
    assert abs(p.mean() - 0.2) < 0.02
    rows = np.arange(200)
    weight = (w.target / w.behavior)[rows, w.action]
    pseudo = (rho * (1.0 - p[:, None]) / ((1.0 - rho) * p[:, None]))[rows, w.action]
    assert np.mean((pseudo - weight) ** 2) < 0.2 * np.mean((1.0 - weight) ** 2)


@pytest.mark.parametrize("with_features", [True, False])
def test_renumbering_items_changes_nothing(with_features: bool) -> None:
    w = world(1)
    if not with_features:
        w = replace(w, item_features=None)
    new = np.random.default_rng(3).permutation(5)  # new[j]: the old number of item j
    place = np.argsort(new)
    renumbered = replace(
        w,
        behavior=w.behavior[:, new],
        target=w.target[:, new],
        action=place[w.action],
        item_features=None if w.item_features is None else w.item_features[new],
    )
    rho = fit_network(w, 0.2, QUICK).rho
    np.testing.assert_array_equal(fit_network(renumbered, 0.2, QUICK).rho, rho[:, new])


def test_no_qualifying_penalty_is_reported_not_a_crash() -> None:
    w = world(2)
    options = NetworkOptions(hidden=8, epochs=1, penalties=(0.1, 1.0))
    fit = fit_network(w, 0.2, options)
    assert not fit.qualified and fit.chosen in options.penalties
    assert np.all((fit.rho > 0) & (fit.rho < 1))


def test_all_fits_not_finite_is_an_error_that_says_so() -> None:
    w = world(3)
    options = NetworkOptions(hidden=8, epochs=3, learning_rate=1e30, penalties=(1.0,))
    with pytest.raises(OfftowerError, match="non-finite"):
        fit_network(w, 0.2, options)


def test_same_seed_same_split_and_global_generator_untouched() -> None:
    import torch

    w = world(4)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = fit_network(w, 0.2, QUICK, seed=5).rho
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(first, fit_network(w, 0.2, QUICK, seed=5).rho)
    assert not np.array_equal(first, fit_network(w, 0.2, QUICK, seed=6).rho)


def test_network_needs_context() -> None:
    even = np.full((2, 2), 0.5)
    log = SelectionLog.from_policies([0, 1], [0.0, 1.0], even, even)
    with pytest.raises(OfftowerError, match="context"):
        pseudo_problem(log, 0.2, NetworkOptions())


def test_shapes_that_differ_are_refused() -> None:
    w = world(5)
    for wrong in (replace(w, context=w.context[:-1]), replace(w, item_features=w.context[:4])):
        with pytest.raises(OfftowerError, match="do not match"):
            fit_network(wrong, 0.2, QUICK)


def test_wrong_options_are_refused() -> None:
    for wrong in ({"penalties": (1.0, 0.1)}, {"hidden": 0}, {"epochs": 0}):
        with pytest.raises(OfftowerError):
            NetworkOptions(**wrong)
