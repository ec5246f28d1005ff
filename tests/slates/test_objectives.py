"""Objectives over slates: values and gradients against enumeration in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offtower.data.rounds import Rounds
from offtower.errors import ConfigError
from offtower.objectives import LoggedRows, Reduction, SlateObjective, SlateRows, make_objective
from offtower.ops import DenseReward, policy_terms

from .worlds import ITEMS, POSITIONS, SLATES, SlateWorld, conditionals

WORLD = SlateWorld.make(0, contexts=2, distance=0.5)
REWARD_MODEL = np.random.default_rng(3).uniform(size=(2, ITEMS))


def logged_rows(logits, x, slate, reward, *, kind="conditional", model=False):
    """Rows of whole rounds as a training step passes them. logits: (X, 8), differentiable."""
    items = torch.from_numpy(SLATES[slate].reshape(-1))
    number = torch.from_numpy(np.repeat(x, POSITIONS))
    terms = policy_terms(
        logits[number],
        torch.eye(ITEMS, dtype=torch.float64),
        items,
        reward_model=DenseReward(torch.from_numpy(REWARD_MODEL)[number]) if model else None,
    )
    pscore = conditionals(WORLD.logging)[x, slate]
    if kind == "slate":
        pscore = np.repeat(pscore.prod(axis=1, keepdims=True), POSITIONS, axis=1)
    return LoggedRows(
        torch.from_numpy(reward.reshape(-1)),
        terms=terms,
        pscore=torch.from_numpy(pscore.reshape(-1)),
        slates=SlateRows(Rounds.of_lengths(np.full(len(x), POSITIONS))),
    )


def every_round():
    x = np.repeat(np.arange(2), len(SLATES))
    slate = np.tile(np.arange(len(SLATES)), 2)
    return x, slate


def true_value(logits):
    """The value of the policy by summing over all slates, differentiable."""
    p = logits.softmax(1)
    chosen = p[:, torch.from_numpy(SLATES)]
    before = chosen.cumsum(2) - chosen
    joint = (chosen / (1.0 - before)).prod(2)
    return (joint * torch.from_numpy(WORLD.mean.sum(axis=2))).sum() / 2


class Expected(Reduction):
    """Means over rows weighted by the probability of their slate: exact expectations."""

    def __init__(self, probability):
        super().__init__(1)
        object.__setattr__(self, "weight", torch.from_numpy(np.repeat(probability, POSITIONS)))

    def sum(self, per_row):
        return (self.weight * per_row).sum()

    def total(self, per_row):
        return (self.weight * per_row.detach()).sum()


@pytest.mark.parametrize("interaction", ["cascade", "standard"])
@pytest.mark.parametrize("name", ["ips", "clipped_ips", "dr", "clipped_dr"])
def test_value_and_gradient_equal_enumeration(name, interaction):
    logits = torch.from_numpy(np.log(WORLD.target)).requires_grad_()
    x, slate = every_round()
    probability = WORLD.slate_probability(WORLD.logging)[x, slate] / 2
    arguments = {"max_weight": 1e9} if "clipped" in name else {}
    objective = SlateObjective(make_objective(name, arguments), "conditional", interaction)
    rows = logged_rows(logits, x, slate, WORLD.mean[x, slate], model="dr" in name)
    found = objective(rows, Expected(probability))
    truth = true_value(logits)
    assert found.value.item() == pytest.approx(truth.item(), abs=1e-10)
    (gradient,) = torch.autograd.grad(-found.loss, logits)
    (expected,) = torch.autograd.grad(truth, logits)
    assert (gradient - expected).abs().max() < 1e-10


def test_pscores_of_whole_slates_give_the_standard_gradient():
    logits = torch.from_numpy(np.log(WORLD.target)).requires_grad_()
    x, slate = every_round()
    probability = WORLD.slate_probability(WORLD.logging)[x, slate] / 2
    objective = SlateObjective(make_objective("ips"), "slate")
    found = objective(
        logged_rows(logits, x, slate, WORLD.mean[x, slate], kind="slate"), Expected(probability)
    )
    (gradient,) = torch.autograd.grad(-found.loss, logits)
    (expected,) = torch.autograd.grad(true_value(logits), logits)
    assert (gradient - expected).abs().max() < 1e-10


def test_a_gradient_is_the_sum_of_later_rewards_times_the_gradient_of_a_position():
    logits = torch.from_numpy(np.log(WORLD.target)).requires_grad_()
    x, slate, reward = WORLD.draw(5, np.random.default_rng(1))
    found = SlateObjective(make_objective("ips"), "conditional")(
        logged_rows(logits, x, slate, reward), Reduction(5)
    )
    (gradient,) = torch.autograd.grad(-found.loss, logits)
    expected = torch.zeros_like(logits)
    for i in range(5):
        log_pi, weights = [], []
        p = logits[x[i]].softmax(0)
        shown = SLATES[slate[i]]
        for k in range(POSITIONS):
            mass = 1.0 - sum(p[j] for j in shown[:k])
            log_pi.append((p[shown[k]] / mass).log())
            pscore = conditionals(WORLD.logging)[x[i], slate[i]][: k + 1].prod()
            weights.append(np.exp(sum(one.item() for one in log_pi)) / pscore)
        for j in range(POSITIONS):
            later = sum(weights[k] * reward[i, k] for k in range(j, POSITIONS))
            (one,) = torch.autograd.grad(log_pi[j], logits, retain_graph=True)
            expected += one * later / 5
    assert (gradient - expected).abs().max() < 1e-10


def test_clipping_holds_constant_weights_of_the_items_above():
    logits = torch.from_numpy(np.log(WORLD.target)).requires_grad_()
    x, slate, reward = WORLD.draw(4, np.random.default_rng(2))
    rows = logged_rows(logits, x, slate, reward, model=True)
    objective = SlateObjective(make_objective("clipped_dr", {"max_weight": 0.5}), "conditional")
    found = objective(rows, Reduction(4))
    value = 0.0
    for i in range(4):
        p, q = WORLD.target[x[i]], REWARD_MODEL[x[i]]
        shown = SLATES[slate[i]]
        ratio = (
            conditionals(WORLD.target)[x[i], slate[i]] / conditionals(WORLD.logging)[x[i], slate[i]]
        )
        for k in range(POSITIONS):
            left = [a for a in range(ITEMS) if a not in shown[:k]]
            above = 1.0 if k == 0 else min(ratio[:k].prod(), 0.5)
            weight = min(ratio[: k + 1].prod(), 0.5)
            value += weight * (reward[i, k] - q[shown[k]])
            value += above * (p[left] @ q[left]) / p[left].sum()
    assert found.value.item() == pytest.approx(value / 4, abs=1e-10)


@pytest.mark.parametrize("name", ["snips", "weighted_likelihood", "behavior_cloning", "softmax"])
def test_other_objectives_take_whole_rounds(name):
    logits = torch.from_numpy(np.log(WORLD.target)).requires_grad_()
    x, slate, reward = WORLD.draw(50, np.random.default_rng(4))
    objective = SlateObjective(make_objective(name), "conditional")
    found = objective(logged_rows(logits, x, slate, reward), Reduction(50))
    (gradient,) = torch.autograd.grad(found.loss, logits)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_cloning_is_the_likelihood_of_each_item_given_those_above():
    logits = torch.from_numpy(np.log(WORLD.target))
    x, slate, reward = WORLD.draw(20, np.random.default_rng(5))
    objective = SlateObjective(make_objective("behavior_cloning"), "conditional")
    found = objective(logged_rows(logits, x, slate, reward), Reduction(20))
    expected = np.log(conditionals(WORLD.target)[x, slate]).sum() / 20
    assert found.loss.item() == pytest.approx(-expected, abs=1e-10)


def test_what_has_no_form_is_refused():
    with pytest.raises(ConfigError, match="no form for slates"):
        SlateObjective(make_objective("potec"), "conditional")
    with pytest.raises(ConfigError, match="permit standard only"):
        SlateObjective(make_objective("ips"), "slate", "cascade")
    with pytest.raises(ConfigError, match="conditional weight"):
        SlateObjective(make_objective("dr"), "slate")
