"""The served policy against enumeration over all items in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import chisquare

from offtower.config import ServingConfig
from offtower.config.serving import changed_serving, parse_serving
from offtower.errors import ConfigError
from offtower.models.items import ItemEmbeddings
from offtower.ops import DenseReward, FactoredReward
from offtower.ops.types import Eligibility, ItemLists
from offtower.serving import ServedPolicy, served_probabilities

ROWS, ITEMS, DIM = 7, 50, 6
SETTINGS = [
    {},
    {"temperature": 0.4},
    {"uniform": 0.05},
    {"temperature": 0.05, "uniform": 0.1},
    {"top": 5},
    {"top": 5, "uniform": 0.2, "temperature": 2.0},
    {"top": 1, "uniform": 0.1},
    {"top": 500, "uniform": 0.1},
    {"uniform": 1.0},
]


class World:
    """Operands with 50 items, float64 scores and a reward model."""

    def __init__(self, *, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> None:
        g = torch.Generator().manual_seed(3)
        draw = {"dtype": torch.float64, "generator": g}
        self.context = (scale * torch.randn(ROWS, DIM, **draw)).to(dtype)
        self.items = ItemEmbeddings(
            torch.randn(ITEMS, DIM, **draw).to(dtype), torch.randn(ITEMS, **draw).to(dtype)
        )
        self.action = torch.randint(ITEMS, (ROWS,), generator=g)
        self.policy: Any = SimpleNamespace(temperature=0.7)
        self.factored = FactoredReward(
            torch.randn(ROWS, 3, **draw).to(dtype),
            torch.randn(ITEMS, 3, **draw).to(dtype),
            link="sigmoid",
        )
        assert self.items.bias is not None
        logit = self.context.double() @ self.items.embedding.double().T / 0.7
        self.score = (logit + self.items.bias.double()).numpy()
        raw = self.factored.context.double() @ self.factored.item.double().T
        self.q = torch.sigmoid(raw).numpy()

    def probability(self, serving: ServingConfig, allowed: np.ndarray | None = None) -> np.ndarray:
        """(B, N); allowed: (B, N), which items are eligible."""
        if allowed is None:
            allowed = np.ones_like(self.score, dtype=bool)
        score = np.where(allowed, self.score / serving.temperature, -np.inf)
        if serving.top is not None:
            worst = -np.sort(-score, axis=1)[:, min(serving.top, ITEMS) - 1, None]
            score = np.where(score >= worst, score, -np.inf)
        share = allowed / allowed.sum(1, keepdims=True)
        return (1 - serving.uniform) * softmax(score, axis=1) + serving.uniform * share

    def served(self, **serving: Any) -> ServedPolicy:
        return ServedPolicy(self.policy, ServingConfig(**serving))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_terms_equal_enumeration(setting: dict[str, Any]) -> None:
    world = World()
    served = world.served(**setting)
    p = world.probability(served.serving)
    row = np.arange(ROWS)
    for reward in (world.factored, DenseReward(torch.from_numpy(world.q))):
        found = served.terms(
            world.context, world.items, world.action, reward_model=reward, entropy=True
        )
        own = p[row, world.action.numpy()]
        np.testing.assert_allclose(found.log_prob.exp().numpy(), own, rtol=1e-10)
        assert found.expected_reward is not None and found.entropy is not None
        np.testing.assert_allclose(found.expected_reward.numpy(), (p * world.q).sum(1), rtol=1e-10)
        assert found.action_reward is not None
        np.testing.assert_allclose(
            found.action_reward.numpy(), world.q[row, world.action.numpy()], rtol=1e-10
        )
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(1)
        np.testing.assert_allclose(found.entropy.numpy(), entropy, rtol=1e-9, atol=1e-12)
    every = torch.arange(ITEMS).expand(ROWS, -1)
    log_prob = served.log_prob_at(world.context, world.items, every, found.log_normalizer)
    np.testing.assert_allclose(log_prob.exp().numpy(), p, rtol=1e-10, atol=1e-300)
    member = torch.tensor([3, 4, 9, 30])
    mass = served.log_mass(world.context, world.items, member, found.log_normalizer)
    np.testing.assert_allclose(mass.exp().numpy(), p[:, member].sum(1), rtol=1e-10, atol=1e-300)


def restrictions(world: World) -> tuple[dict[str, Eligibility], dict[str, np.ndarray]]:
    """Bitmaps of three groups with excluded items, and candidate lists; and both as (B, N)."""
    rng = np.random.default_rng(5)
    bits, group = rng.random((3, ITEMS)) < 0.5, rng.integers(3, size=ROWS)
    own = world.action.numpy()
    bits[group, own] = True
    packed = np.packbits(np.pad(bits, ((0, 0), (0, -ITEMS % 64))), axis=1, bitorder="little")
    bitmap = torch.from_numpy(packed.view("<i8").astype(np.int64))
    lists = []
    for share in (0.1, 0.3):
        picked = rng.random((ROWS, ITEMS)) < share
        picked[np.arange(ROWS), own] = share == 0.3
        offsets = torch.from_numpy(np.append(0, picked.sum(1).cumsum()))
        lists.append((picked, ItemLists(offsets, torch.from_numpy(np.nonzero(picked)[1]))))
    (excluded, excluded_lists), (candidates, candidate_lists) = lists
    groups = torch.from_numpy(group.astype(np.int32))
    by_group = bits[group] & ~excluded
    return (
        {
            "groups": Eligibility(groups, bitmap, excluded_lists),
            "candidates": Eligibility(groups, bitmap, None, candidate_lists),
        },
        {"groups": by_group, "candidates": bits[group] & candidates},
    )


@pytest.mark.parametrize("form", ["groups", "candidates"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_terms_over_eligible_items_equal_enumeration(setting: dict[str, Any], form: str) -> None:
    world = World()
    served = world.served(**setting)
    eligible, allowed = (found[form] for found in restrictions(world))
    p = world.probability(served.serving, allowed)
    found = served.terms(
        world.context,
        world.items,
        world.action,
        reward_model=world.factored,
        entropy=True,
        eligible=eligible,
    )
    own = p[np.arange(ROWS), world.action.numpy()]
    np.testing.assert_allclose(found.log_prob.exp().numpy(), own, rtol=1e-10)
    assert found.expected_reward is not None and found.entropy is not None
    np.testing.assert_allclose(found.expected_reward.numpy(), (p * world.q).sum(1), rtol=1e-10)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(1)
    np.testing.assert_allclose(found.entropy.numpy(), entropy, rtol=1e-9, atol=1e-12)
    logits = torch.from_numpy(np.where(allowed, world.score, -np.inf))
    np.testing.assert_allclose(
        served_probabilities(logits, served.serving).numpy(), p, rtol=1e-10, atol=1e-300
    )
    every = torch.arange(ITEMS).expand(ROWS, -1)
    arguments = (world.context, world.items, every, found.log_normalizer)
    log_prob = served.log_prob_at(*arguments, eligible=eligible)
    np.testing.assert_allclose(log_prob.exp().numpy(), p, rtol=1e-10, atol=1e-300)
    item, log_prob = served.draw(
        world.context, world.items, 300, torch.Generator().manual_seed(1), eligible
    )
    at = np.take_along_axis(p, item.numpy(), 1)
    assert (at > 0.0).all()
    np.testing.assert_allclose(log_prob.exp().numpy(), at, rtol=1e-9)
    # Chi-square of each row at 1e-6: 7e-6 a setting and form.
    count = np.stack([np.bincount(row, minlength=ITEMS) for row in item.numpy()])
    for row in range(ROWS):
        large = p[row] * 300 >= 5.0
        observed = np.append(count[row][large], count[row][~large].sum())
        expected = 300 * np.append(p[row][large], p[row][~large].sum())
        keep = expected > 1e-9
        if keep.sum() > 1:
            assert chisquare(observed[keep], expected[keep]).pvalue > 1e-6


@pytest.mark.parametrize("uniform", [1e-12, 1e-3, 1 - 1e-12])
def test_mixture_is_exact_where_one_part_underflows(uniform: float) -> None:
    # Scores of some thousands: most softmax probabilities are below the least float64.
    world = World(scale=2000.0)
    served = world.served(uniform=uniform)
    found = served.terms(world.context, world.items, world.action).log_prob.numpy()
    log_softmax = world.score - world.score.max(1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(1, keepdims=True))
    own = log_softmax[np.arange(ROWS), world.action.numpy()]
    wanted = np.logaddexp(own + math.log1p(-uniform), math.log(uniform / ITEMS))
    assert (own < -745).any()
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_float32_log_prob_is_accurate(setting: dict[str, Any]) -> None:
    world = World(dtype=torch.float32)
    served = world.served(**setting)
    found = served.terms(world.context, world.items, world.action).log_prob.exp().double().numpy()
    wanted = world.probability(served.serving)[np.arange(ROWS), world.action.numpy()]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_default_has_the_bits_of_the_trained_policy() -> None:
    from offtower.ops import policy_terms

    world = World(dtype=torch.float32)
    found = world.served().terms(world.context, world.items, world.action, entropy=True)
    plain = policy_terms(
        world.context,
        world.items.embedding,
        world.action,
        temperature=0.7,
        item_bias=world.items.bias,
        entropy=True,
    )
    for name in ("log_prob", "log_normalizer", "entropy"):
        assert torch.equal(getattr(found, name), getattr(plain, name))


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.get("top") != 500], ids=str)
def test_draws_follow_the_served_policy(setting: dict[str, Any]) -> None:
    """Chi-square at 1e-5 a setting and kind of draw: 1.6e-4 in all."""
    world, draws = World(), 40_000
    served = world.served(**setting)
    p = world.probability(served.serving)[0]
    context, action = world.context[:1], world.action[:1]
    terms = served.terms(context, world.items, action)
    generator = torch.Generator().manual_seed(11)
    item, log_prob = served.draw(context, world.items, draws, generator)
    both = served.terms_and_draws(context, world.items, action, draws=draws, generator=generator)
    assert torch.equal(both[0].log_prob, terms.log_prob) or torch.allclose(
        both[0].log_prob, terms.log_prob, rtol=1e-12
    )
    np.testing.assert_allclose(log_prob.exp().numpy()[0], p[item.numpy()[0]], rtol=1e-9)
    for drawn in (item, both[1]):
        count = np.bincount(drawn.numpy()[0], minlength=ITEMS)
        assert not count[p == 0.0].any()
        large = p * draws >= 5.0
        observed = np.append(count[large], count[~large].sum())
        expected = np.append(p[large], p[~large].sum()) * draws
        keep = expected > 0.0
        if keep.sum() > 1:
            assert chisquare(observed[keep], expected[keep] * observed.sum() / draws).pvalue > 1e-5


def test_top_k_is_deterministic() -> None:
    world = World()
    served = world.served(mode="top_k", k=3)
    order = np.argsort(-world.score, axis=1)
    for position in range(4):
        at = torch.full((ROWS,), position)
        shown = order[:, position]
        for action, log_prob in ((shown, 0.0), (order[:, 10], -math.inf)):
            found = served.terms(
                world.context,
                world.items,
                torch.from_numpy(action),
                reward_model=world.factored,
                position=at,
                entropy=True,
            )
            # A fourth item is never shown.
            assert (found.log_prob == (log_prob if position < 3 else -math.inf)).all()
            assert found.expected_reward is not None and found.entropy is not None
            wanted = world.q[np.arange(ROWS), shown] * (position < 3)
            np.testing.assert_allclose(found.expected_reward.numpy(), wanted, rtol=1e-12)
            assert not found.entropy.any()
    first = served.terms(world.context, world.items, torch.from_numpy(order[:, 0]))
    assert not first.log_prob.any()
    item, log_prob = served.draw(world.context, world.items, 7, torch.Generator())
    assert np.array_equal(item.numpy(), order[:, [0, 1, 2, 0, 1, 2, 0]]) and not log_prob.any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mode": "top_k", "uniform": 0.1}, "no effect"),
        ({"k": 5, "top": 3}, "cannot be drawn from the 3 best"),
        ({"temperature": 0.0}, "temperature"),
        ({"uniform": 1.5}, "uniform"),
        ({"softness": 1}, "softness"),
    ],
)
def test_settings_are_validated(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_serving(content, "serving")


def test_changed_serving() -> None:
    base = ServingConfig(k=3, temperature=2.0)
    assert changed_serving(base, "greedy") == ServingConfig(k=3, mode="top_k")
    assert changed_serving(base, "temperature=.5, uniform=.1") == ServingConfig(
        k=3, temperature=0.5, uniform=0.1
    )
    assert changed_serving(ServingConfig(top=4), "top=null") == ServingConfig()
    for wrong in ("soft", "heat=2", "temperature=warm", ""):
        with pytest.raises(ConfigError):
            changed_serving(base, wrong)
