"""Slates of served policies: weights, expected rewards and the closed loop, by round."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from offtower.config import ServingConfig
from offtower.data.rounds import Rounds
from offtower.errors import OfftowerError
from offtower.evaluation.scoring.rewards import CatalogueReward
from offtower.evaluation.scoring.slates import SlateScorer, position_log_prob, score_slates
from offtower.models.items import ItemEmbeddings
from offtower.ops import Eligibility, FactoredReward, ItemLists
from offtower.serving import ServedPolicy
from offtower.slates import check_marginals

N, D = 40, 6


class Policy:
    """What `ServedPolicy` reads of a policy: its temperature."""

    temperature = 1.0


def world(seed=0, scale=1.0, rounds=6):
    generator = torch.Generator().manual_seed(seed)
    context = scale * torch.randn(rounds, D, generator=generator)
    items = ItemEmbeddings(
        torch.randn(N, D, generator=generator), 0.3 * torch.randn(N, generator=generator)
    )
    return context, items


def single_draw(serving, context, items, allowed=None):
    """(R, N) probabilities of a single draw, in float64 from their definition."""
    logit = (context.double() @ items.embedding.double().T + items.bias.double()).numpy()
    logit = logit / serving.temperature
    allowed = np.ones_like(logit, dtype=bool) if allowed is None else allowed
    logit = np.where(allowed, logit, -np.inf)
    if serving.top is not None:
        least = np.sort(logit, axis=1)[:, -serving.top][:, None]
        logit = np.where(logit >= least, logit, -np.inf)
    p = np.exp(logit - logit.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    even = allowed / allowed.sum(axis=1, keepdims=True)
    return (1.0 - serving.uniform) * p + serving.uniform * even


def drawn_slates(p, lengths, rng):
    """Slates drawn one item at a time without replacement."""
    out = []
    for row, k in zip(p, lengths, strict=True):
        left = row.copy()
        for _ in range(k):
            item = int(rng.choice(N, p=left / left.sum()))
            out.append(item)
            left[item] = 0.0
    return np.array(out)


SERVINGS = {
    "softmax": ServingConfig(k=6),
    "soft": ServingConfig(k=6, temperature=2.0),
    "uniform": ServingConfig(k=6, uniform=0.01),
    "top": ServingConfig(k=6, top=8),
    "top-uniform": ServingConfig(k=6, top=5, uniform=0.02),
}


@pytest.mark.parametrize("serving", SERVINGS.values(), ids=SERVINGS)
@pytest.mark.parametrize("scale", [0.5, 8.0])
@pytest.mark.parametrize("restricted", [False, True])
def test_weights_and_expected_rewards_equal_their_definition(serving, scale, restricted):
    # At scale 8 the first items of a round hold nearly all mass.
    context, items = world(1, scale)
    lengths = np.array([6, 1, 5, 6, 3, 6])
    rounds, allowed, eligible = Rounds.of_lengths(lengths), None, None
    if restricted:
        allowed = np.ones((6, N), dtype=bool)
        allowed[:, :20:2] = False
        offsets = torch.arange(7) * 10
        eligible = Eligibility(excluded=ItemLists(offsets, torch.arange(0, 20, 2).repeat(6)))
    p = single_draw(serving, context, items, allowed)
    action = drawn_slates(p, lengths, np.random.default_rng(2))
    generator = torch.Generator().manual_seed(3)
    reward = FactoredReward(
        torch.randn(6, 3, generator=generator),
        torch.randn(N, 3, generator=generator),
        None,
        link="sigmoid",
    )
    q = torch.sigmoid(reward.context.double() @ reward.item.double().T).numpy()
    scorer = SlateScorer(
        ServedPolicy(Policy(), serving),
        items,
        context,
        rounds,
        torch.from_numpy(action),
        eligible,
    )
    found = score_slates(scorer, {"m": CatalogueReward(reward)}, draws=0, generator=None)
    for row in range(rounds.num_rows):
        one, k = rounds.number[row], rounds.position[row]
        left = np.ones(N, dtype=bool)
        left[action[row - k : row]] = False
        mass = (p[one] * left).sum()
        assert found.conditional[row].exp().item() == pytest.approx(
            p[one, action[row]] / mass, rel=2e-5
        )
        expected = (p[one] * left * q[one]).sum() / mass
        assert found.predictions["m"].expected_reward[row] == pytest.approx(expected, rel=2e-5)
        assert found.predictions["m"].action_reward[row] == pytest.approx(
            q[one, action[row]], rel=1e-5
        )


def test_all_items_in_a_round():
    context, items = world(4, 3.0, rounds=2)
    few = ItemEmbeddings(items.embedding[:4], items.bias[:4])
    rounds = Rounds.of_lengths([4, 4])
    action = torch.tensor([2, 0, 1, 3, 3, 2, 1, 0])
    scorer = SlateScorer(ServedPolicy(Policy(), ServingConfig(k=4)), few, context, rounds, action)
    found = score_slates(scorer, {}, draws=0, generator=None)
    assert found.conditional[[3, 7]].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)


def test_the_k_best_items_are_certain_at_their_positions():
    context, items = world(5, rounds=2)
    serving = ServingConfig(k=3, mode="top_k")
    best = (context @ items.embedding.T + items.bias).topk(3, dim=1).indices
    rounds = Rounds.of_lengths([3, 4])
    action = torch.cat([best[0], best[1, :1], best[1, 2:], best[1, 1:2], torch.tensor([0])])
    scorer = SlateScorer(ServedPolicy(Policy(), serving), items, context, rounds, action)
    reward = FactoredReward(torch.ones(2, 1), torch.arange(N).float()[:, None] / N, None)
    found = score_slates(scorer, {"m": CatalogueReward(reward)}, draws=0, generator=None)
    assert found.conditional.exp().tolist() == [1, 1, 1, 1, 0, 0, 0]
    expected = found.predictions["m"].expected_reward * N
    assert expected.tolist() == pytest.approx([*best[0].tolist(), *best[1].tolist(), 0.0], rel=1e-5)


def test_expected_rewards_over_draws_are_unbiased():
    context, items = world(6, 1.0, rounds=1)
    serving = ServingConfig(k=3)
    p = single_draw(serving, context, items)
    action = torch.tensor([3, 1, 7])
    rounds = Rounds.of_lengths([3])
    reward = FactoredReward(torch.ones(1, 1), torch.arange(N).float()[:, None] / N, None)
    scorer = SlateScorer(ServedPolicy(Policy(), serving), items, context, rounds, action)
    generator = torch.Generator().manual_seed(0)
    found = score_slates(
        scorer, {"m": CatalogueReward(reward, at_draws=True)}, draws=200_000, generator=generator
    )
    left = p[0].copy()
    left[[3, 1]] = 0.0
    truth = (left * np.arange(N) / N).sum() / left.sum()
    # Standard error below .29 / sqrt(200,000) over the mass left, about .001; five of them.
    assert found.predictions["m"].expected_reward[2] == pytest.approx(truth, abs=0.005)


def test_marginal_pscores_weigh_each_position_by_its_own_marginal():
    context, items = world(7, 1.0, rounds=4)
    few = ItemEmbeddings(items.embedding[:6], items.bias[:6])
    serving = ServingConfig(k=3, uniform=0.1)
    p = single_draw(serving, context, few)
    action, position = torch.tensor([2, 5, 0, 3]), torch.tensor([0, 1, 2, 1])
    served = ServedPolicy(Policy(), serving)
    log_prob = served.terms(context, few, action).log_prob
    found = position_log_prob(served, few, (context, action, position), log_prob, None)
    for row in range(4):
        truth = 0.0
        for slate in permutations(range(6), 3):
            if slate[position[row]] != action[row]:
                continue
            left, chance = 1.0, 1.0
            for item in slate:
                chance *= p[row, item] / left
                left -= p[row, item]
            truth += chance
        assert found[row].exp().item() == pytest.approx(truth, rel=1e-5)
    with pytest.raises(OfftowerError, match="too many to enumerate"):
        check_marginals(10_000, 2)
