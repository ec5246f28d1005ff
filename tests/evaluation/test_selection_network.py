"""The network split: its recipe, its invariance to numbering, and what happens when it fails."""

from __future__ import annotations

import numpy as np
import pytest

from offtower.errors import OfftowerError
from offtower.evaluation.selection import NetworkOptions, fit_network, fit_split, pseudo_weight


def world(seed: int = 0, n: int = 200, items: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(n, 3))
    features = rng.normal(size=(items, 3))
    score = context @ features.T
    target = np.exp(score)
    target /= target.sum(axis=1, keepdims=True)
    behavior = np.full((n, items), 1.0 / items)
    return {
        "behavior": behavior,
        "target": target,
        "action": rng.integers(0, items, n),
        "context": context,
        "item_features": features,
    }


QUICK = NetworkOptions(hidden=32, epochs=150, learning_rate=0.01, penalties=(1.0, 100.0))


def test_learns_the_weights_and_keeps_the_share() -> None:
    w = world()
    rho = fit_split(**w, method="network", network=QUICK)
    p = (w["behavior"] * rho).sum(axis=1)
    assert abs(p.mean() - 0.2) < 0.02
    rows = np.arange(200)
    weight = (w["target"] / w["behavior"])[rows, w["action"]]
    pseudo = pseudo_weight(rho, p[:, None])[rows, w["action"]]
    assert np.mean((pseudo - weight) ** 2) < 0.2 * np.mean((1.0 - weight) ** 2)


@pytest.mark.parametrize("with_features", [True, False])
def test_renumbering_items_changes_nothing(with_features: bool) -> None:
    w = world(1)
    if not with_features:
        w.pop("item_features")
    new = np.random.default_rng(3).permutation(5)  # new[j]: the old number of item j
    place = np.argsort(new)
    renumbered = {
        **w,
        "behavior": w["behavior"][:, new],
        "target": w["target"][:, new],
        "action": place[w["action"]],
    }
    if with_features:
        renumbered["item_features"] = w["item_features"][new]
    rho = fit_split(**w, method="network", network=QUICK)
    np.testing.assert_array_equal(
        fit_split(**renumbered, method="network", network=QUICK), rho[:, new]
    )


def test_no_qualifying_penalty_is_reported_not_a_crash() -> None:
    w = world(2)
    options = NetworkOptions(hidden=8, epochs=1, penalties=(0.1, 1.0))
    fit = fit_network(**w, share=0.2, options=options, seed=0)
    assert not fit.qualified and fit.chosen in options.penalties
    assert np.all((fit.rho > 0) & (fit.rho < 1))


def test_all_fits_not_finite_is_an_error_that_says_so() -> None:
    w = world(3)
    options = NetworkOptions(hidden=8, epochs=3, learning_rate=1e30, penalties=(1.0,))
    with pytest.raises(OfftowerError, match="non-finite"):
        fit_network(**w, share=0.2, options=options, seed=0)


def test_same_seed_same_split_and_global_generator_untouched() -> None:
    import torch

    w = world(4)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = fit_split(**w, method="network", network=QUICK, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(first, fit_split(**w, method="network", network=QUICK, seed=5))
    assert not np.array_equal(first, fit_split(**w, method="network", network=QUICK, seed=6))


def test_network_needs_context_and_action() -> None:
    with pytest.raises(OfftowerError, match="context"):
        fit_split(np.full((2, 2), 0.5), np.full((2, 2), 0.5), method="network")


@pytest.mark.parametrize("pairwise", [True, False])
def test_gradient_of_the_training_step_is_that_of_autograd(pairwise: bool) -> None:
    import torch

    from offtower.evaluation.selection.network import FitProblem, SplitNet, SplitTrainer

    w = world(5)
    behavior, target = torch.from_numpy(w["behavior"]), torch.from_numpy(w["target"])
    logged = torch.from_numpy(w["action"])
    rows = torch.arange(200)
    weight = (target / behavior)[rows, logged]
    context = torch.from_numpy(w["context"]).float()
    item = torch.from_numpy(w["item_features"]).float()
    if pairwise:
        item = torch.randn(200, 5, 2, generator=torch.Generator().manual_seed(0))
    net = SplitNet(3, item.shape[-1], 16)
    logit = net(context, item).double()
    rho = torch.sigmoid(logit)
    p = (behavior * rho).sum(dim=1)
    pseudo = (rho / (1 - rho))[rows, logged] * (1 - p) / p
    loss = ((pseudo - weight) ** 2).mean() + 3.0 * ((p - 0.2) ** 2).mean()
    loss.backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    trainer = SplitTrainer(net, FitProblem(behavior, weight, logged, context, item), 0.0)
    assert trainer.step(3.0, 0.2) == pytest.approx(loss.item(), rel=1e-6)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_wrong_options_are_refused() -> None:
    for wrong in ({"penalties": (1.0, 0.1)}, {"hidden": 0}, {"epochs": 0}):
        with pytest.raises(OfftowerError):
            NetworkOptions(**wrong)
