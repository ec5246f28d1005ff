"""Probabilities, weights and expected rewards of slates against enumeration in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offtower.data.rounds import Rounds, cut_before
from offtower.errors import DataError, OfftowerError
from offtower.slates import (
    Rest,
    conditional_log_prob,
    earlier_sum,
    position_marginals,
    prefix_sum,
    remaining_expected_reward,
    remaining_log_mass,
    sampled_marginals,
    slate_weights,
)

from .worlds import ITEMS, POSITIONS, SLATES, SlateWorld, conditionals, softmax

ROUNDS = Rounds.of_lengths(np.full(len(SLATES), POSITIONS))


def all_rows(probability):
    """(1008,) single-draw log-probabilities of the rows of all slates."""
    return torch.from_numpy(np.log(probability[SLATES]).reshape(-1))


def rest_of(probability, q=None):
    outside = np.ones((len(SLATES), ITEMS), bool)
    np.put_along_axis(outside, SLATES, False, axis=1)
    mass = (outside * probability).sum(axis=1)
    mean = None if q is None else torch.from_numpy((outside * probability * q).sum(axis=1) / mass)
    return Rest(torch.from_numpy(np.log(mass)), mean)


@pytest.mark.parametrize("inverse_temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("with_rest", [False, True])
def test_conditional_probabilities_equal_enumeration(inverse_temperature, with_rest):
    p = softmax(inverse_temperature * np.random.default_rng(0).normal(size=ITEMS))
    rest = rest_of(p) if with_rest else None
    found = conditional_log_prob(all_rows(p), ROUNDS, rest).numpy().reshape(-1, POSITIONS)
    truth = np.log(conditionals(p))
    assert np.abs(found - truth).max() < 1e-10
    assert np.exp(found.sum(axis=1)).sum() == pytest.approx(1.0, abs=1e-10)


def test_the_rest_keeps_digits_where_earlier_items_hold_nearly_all_mass():
    # Two items hold all mass but 1e-36 of it: 1 - sum cancels completely.
    logits = np.array([90.0, 44.0, 7.0, 6.5, 6.0, 5.0, 4.0, 3.0])
    p = softmax(logits)
    rows = Rounds.of_lengths([3])
    shown = [0, 1, 2]
    log_p = logits - np.log(np.exp(logits - 90.0).sum()) - 90.0
    rest = Rest(torch.tensor([np.log(np.exp(log_p[3:]).sum())], dtype=torch.float64))
    found = conditional_log_prob(torch.from_numpy(log_p[shown]), rows, rest)
    truth = np.log(softmax(logits[2:])[0])
    assert found[2].item() == pytest.approx(truth, abs=1e-12)
    assert p[:2].sum() == 1.0
    # Without the rest the mass is clamped, and the probability is finite.
    assert np.isfinite(conditional_log_prob(torch.from_numpy(log_p[shown]), rows).numpy()).all()


@pytest.mark.parametrize("with_rest", [False, True])
def test_remaining_expected_reward_equals_enumeration(with_rest):
    rng = np.random.default_rng(1)
    p, q = softmax(2.0 * rng.normal(size=ITEMS)), rng.uniform(size=ITEMS)
    rest = rest_of(p, q) if with_rest else None
    mean = torch.full((len(SLATES),), float(p @ q), dtype=torch.float64)
    shown = torch.from_numpy(q[SLATES].reshape(-1))
    found = remaining_expected_reward(all_rows(p), mean, shown, ROUNDS, rest)
    for s, slate in enumerate(SLATES):
        for k in range(POSITIONS):
            left = [a for a in range(ITEMS) if a not in slate[:k]]
            truth = (p[left] @ q[left]) / p[left].sum()
            assert found[s * POSITIONS + k].item() == pytest.approx(truth, abs=1e-10)


@pytest.mark.parametrize("with_rest", [False, True])
def test_gradients_are_exact(with_rest):
    rounds = Rounds.of_lengths([3, 1, 2])
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(size=(3, 5))).requires_grad_()
    q = torch.from_numpy(rng.uniform(size=(3, 5))).requires_grad_()
    item = torch.tensor([0, 3, 1, 2, 4, 0])
    number = torch.from_numpy(rounds.number)
    shown = torch.zeros(3, 5, dtype=torch.bool)
    shown[number, item] = True

    def outputs(logits, q):
        log_p = logits.log_softmax(1)
        chosen, mean = log_p[number, item], (log_p.exp() * q).sum(1)
        rest = None
        if with_rest:
            outside = log_p.masked_fill(shown, float("-inf"))
            mass = outside.logsumexp(1)
            rest = Rest(mass, ((outside - mass[:, None]).exp() * q).sum(1))
        return (
            conditional_log_prob(chosen, rounds, rest),
            remaining_expected_reward(chosen, mean, q[number, item], rounds, rest),
        )

    assert torch.autograd.gradcheck(outputs, (logits, q))


def test_a_round_of_all_items_has_a_certain_last_position_and_finite_gradients():
    logits = torch.tensor([[0.3, -0.2, 0.9]], dtype=torch.float64, requires_grad=True)
    rounds = Rounds.of_lengths([3])
    rest = Rest(torch.tensor([float("-inf")], dtype=torch.float64))
    found = conditional_log_prob(logits.log_softmax(1)[0], rounds, rest)
    assert found[2].item() == 0.0
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("error", [-1e-6, 0.0, 1e-7, 1e-6])
def test_rounding_puts_no_conditional_probability_above_1(error):
    """Two eligible items, both shown, and a float32 log-probability of the first."""
    second = torch.tensor(-18.0, dtype=torch.float64)
    log_prob = torch.stack([torch.log1p(-second.exp()) + error, second]).requires_grad_()
    found = conditional_log_prob(log_prob, Rounds.of_lengths([2]))
    assert found[1] <= 0.0 and -2e-6 < found[0] <= max(0.0, error)
    if error > 0.0:
        assert found[1] == 0.0
    (gradient,) = torch.autograd.grad(found[1], log_prob)
    assert torch.isfinite(gradient).all()


def test_weights_multiply_along_the_positions():
    rounds = Rounds.of_lengths([2, 3])
    target = torch.tensor([0.5, 0.25, 0.2, 0.4, 0.5], dtype=torch.float64).log()
    logging = torch.tensor([0.25, 0.5, 0.4, 0.1, 0.25], dtype=torch.float64).log()
    weights = slate_weights(target, logging, rounds, "conditional")
    assert weights.item.exp().tolist() == pytest.approx([2.0, 0.5, 0.5, 4.0, 2.0])
    assert weights.cascade.exp().tolist() == pytest.approx([2.0, 1.0, 0.5, 2.0, 4.0])
    assert weights.earlier.exp().tolist() == pytest.approx([1.0, 2.0, 1.0, 0.5, 2.0])
    assert weights.slate.exp().tolist() == pytest.approx([1.0, 1.0, 4.0, 4.0, 4.0])
    whole = torch.tensor([0.125, 0.125, 0.01, 0.01, 0.01], dtype=torch.float64).log()
    found = slate_weights(target, whole, rounds, "slate")
    assert found.slate.exp().tolist() == pytest.approx([1.0, 1.0, 4.0, 4.0, 4.0])
    with pytest.raises(OfftowerError, match="'standard' only"):
        found.of("cascade")
    with pytest.raises(OfftowerError, match="marginal"):
        weights.of("independent")


@pytest.mark.parametrize("position", range(3))
def test_position_marginals_equal_enumeration(position):
    world = SlateWorld.make(3)
    found = position_marginals(torch.from_numpy(np.log(world.target)), position).numpy()
    slates = world.slate_probability(world.target)
    for item in range(ITEMS):
        truth = slates[:, SLATES[:, position] == item].sum(axis=1)
        assert np.abs(found[:, item] - truth).max() < 1e-12


@pytest.mark.parametrize("position", [1, 2, 3])
def test_sampled_marginals_are_unbiased_and_independent_between_rows(position):
    """5,000 equal rows: their mean within 4.5 of its standard errors (false alarm 7e-6 each)."""
    world, rows = SlateWorld.make(3), 5_000
    log_prob = torch.from_numpy(np.log(world.target))[:1]
    generator = torch.Generator().manual_seed(1)
    exact = position_marginals(log_prob, position)[0]
    for item in (0, 4):
        action = torch.full((rows,), item)
        found = sampled_marginals(log_prob.expand(rows, -1), action, position, generator)
        error = found.std() / rows**0.5
        assert 0.0 < error < 0.02 * exact[item]
        assert abs(found.mean() - exact[item]) < 4.5 * error


def test_marginals_of_a_large_catalogue_are_refused():
    many = torch.zeros(1, 1).expand(1, 100_001)
    with pytest.raises(OfftowerError, match="100,001 items, above the limit"):
        sampled_marginals(many, torch.tensor([0]), 2, torch.Generator())
    log_prob = torch.full((1, 10_000), -np.log(10_000))
    with pytest.raises(OfftowerError, match="too many to enumerate"):
        position_marginals(log_prob, 2)
    assert position_marginals(log_prob, 1).sum().item() == pytest.approx(1.0, abs=1e-6)


def test_rounds_of_rows():
    rounds = Rounds.of([7, 7, 9, 9, 9, 7], [0, 1, 0, 1, 2, 0])
    assert rounds.offsets.tolist() == [0, 2, 5, 6]
    assert rounds.number.tolist() == [0, 0, 1, 1, 1, 2]
    assert rounds.longest == 3
    assert rounds.sum(np.arange(6.0)).tolist() == [1.0, 9.0, 5.0]
    assert rounds.rows_of(np.array([2, 1])).tolist() == [5, 2, 3, 4]
    assert Rounds.of_positions([0, 1, 0, 1, 2, 0]).offsets.tolist() == [0, 2, 5, 6]
    with pytest.raises(DataError, match="row 3 has position 2, expected 1"):
        Rounds.of([7, 7, 9, 9], [0, 1, 0, 2])
    empty = Rounds.of([])
    assert len(empty) == 0 and empty.sum(np.zeros((0, 2))).shape == (0, 2)


def test_sums_along_positions():
    rounds = Rounds.of_lengths([1, 3])
    values = torch.tensor([5.0, 1.0, 2.0, 3.0])
    assert prefix_sum(values, rounds).tolist() == [5.0, 1.0, 3.0, 6.0]
    assert earlier_sum(values, rounds).tolist() == [0.0, 0.0, 1.0, 3.0]
    assert remaining_log_mass(values - 10.0, rounds)[0].item() == 0.0


def test_cuts_keep_rounds_whole():
    starts = np.array([1, 0, 1, 0, 0, 0, 1, 1, 0], dtype=bool)
    assert cut_before(starts, 3) == [0, 2, 6, 9]
    assert cut_before(starts, 100) == [0, 9]
    assert cut_before(np.zeros(0, bool), 3) == [0, 0]
