"""Limits on the share of new items against enumeration over all items in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.special import softmax
from scipy.stats import chisquare

from offtower.config import NewItemsConfig, ServingConfig, parse_config
from offtower.config.serving import changed_serving, parse_serving
from offtower.data import CatalogueSchema, FeatureSpec, write_catalogue, write_log
from offtower.data.encoding import FeatureEncoding
from offtower.errors import ConfigError
from offtower.evaluation.frontier import _grid
from offtower.ops.types import Eligibility
from offtower.prepare import open_data
from offtower.progress import Progress
from offtower.serving import (
    LimitedPolicy,
    ServedPolicy,
    served_policy,
    served_probabilities,
)
from offtower.serving.limits import new_numbers
from tests.data.conftest import make_schema, make_table
from tests.test_served_policy import ITEMS, ROWS, World, restrictions

NEW = np.zeros(ITEMS, dtype=bool)
NEW[[2, 3, 11, 30, 31, 49]] = True
LIMITS = [(0.0, 0.05), (0.3, 1.0), (0.2, 0.21), (0.0, 1.0)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4, "uniform": 0.1},
    {"top": 5, "uniform": 0.2},
]


def limited(limits: tuple[float, float], setting: dict[str, Any]) -> LimitedPolicy:
    rules = {"feature": "age", "below": 7.0, "at_least": limits[0], "at_most": limits[1]}
    serving = ServingConfig(**setting, new_items=rules)  # type: ignore[arg-type]
    found = served_policy(World().policy, serving, torch.from_numpy(NEW))
    assert isinstance(found, LimitedPolicy)
    return found


def expected(p: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    mass = p[:, NEW].sum(1, keepdims=True)
    share = np.clip(mass, *limits)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(NEW, p * share / mass, p * (1.0 - share) / (1.0 - mass))
    return np.where((mass <= 0.0) | (mass >= 1.0), p, scaled)


@pytest.mark.parametrize("form", ["all", "groups", "candidates"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("limits", LIMITS)
def test_probabilities_equal_enumeration(
    limits: tuple[float, float], setting: dict[str, Any], form: str
) -> None:
    world, served = World(), limited(limits, setting)
    forms, masks = restrictions(world)
    eligible: Eligibility | None = forms.get(form)
    whole = world.probability(ServingConfig(**setting), masks.get(form))
    p, row = expected(whole, limits), np.arange(ROWS)
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-12)
    found = served.terms(
        world.context,
        world.items,
        world.action,
        reward_model=world.factored,
        entropy=True,
        eligible=eligible,
    )
    own = p[row, world.action.numpy()]
    np.testing.assert_allclose(found.log_prob.exp().numpy(), own, rtol=1e-9)
    assert found.expected_reward is not None and found.entropy is not None
    np.testing.assert_allclose(found.expected_reward.numpy(), (p * world.q).sum(1), rtol=1e-9)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(1)
    np.testing.assert_allclose(found.entropy.numpy(), entropy, rtol=1e-8, atol=1e-11)
    every = torch.arange(ITEMS).expand(ROWS, -1)
    log_prob = served.log_prob_at(
        world.context, world.items, every, found.log_normalizer, eligible=eligible
    )
    np.testing.assert_allclose(log_prob.exp().numpy(), p, rtol=1e-9, atol=1e-300)
    shown = torch.tensor([[2, 7, -1]]).expand(ROWS, -1)
    rest = served.rest(
        world.context,
        world.items,
        shown,
        found.log_normalizer,
        reward_model=world.factored,
        eligible=eligible,
    )
    left = p.copy()
    left[:, [2, 7]] = 0.0
    np.testing.assert_allclose(rest.log_mass.exp().numpy(), left.sum(1), rtol=1e-8)
    assert rest.expected_reward is not None
    mean = (left * world.q).sum(1) / left.sum(1)
    np.testing.assert_allclose(rest.expected_reward.numpy(), mean, rtol=1e-8)


def test_terms_and_draws_score_the_catalogue_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world, served = World(), limited((0.2, 0.21), SETTINGS[1])
    rows = (world.context, world.items, world.action)
    wanted = served.terms(*rows, reward_model=world.factored)
    draws, _ = served.draw(*rows[:2], 7, torch.Generator().manual_seed(4))
    calls, terms = [], ServedPolicy.terms
    monkeypatch.setattr(
        ServedPolicy, "terms", lambda *given, **named: calls.append(1) or terms(*given, **named)
    )
    found, drawn = served.terms_and_draws(
        *rows, draws=7, generator=torch.Generator().manual_seed(4), reward_model=world.factored
    )
    assert len(calls) == 1
    assert torch.equal(found.log_prob, wanted.log_prob) and torch.equal(drawn, draws)


def test_dense_probabilities_are_the_same() -> None:
    world, served = World(), limited((0.2, 0.21), SETTINGS[1])
    found = served_probabilities(
        torch.from_numpy(world.score), served.serving, torch.from_numpy(NEW)
    )
    p = expected(world.probability(ServingConfig(**SETTINGS[1])), (0.2, 0.21))
    np.testing.assert_allclose(found.numpy(), p, rtol=1e-10)
    np.testing.assert_allclose(found[:, NEW].sum(1).min(), 0.2, atol=0.011)


@pytest.mark.parametrize("limits", [(0.3, 1.0), (0.0, 0.05)])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_probabilities(
    limits: tuple[float, float], setting: dict[str, Any]
) -> None:
    """A chi-squared test by row, each at 1e-6; frequent items only."""
    world, served = World(), limited(limits, setting)
    generator = torch.Generator().manual_seed(0)
    count = 3000
    item, log_prob = served.draw(world.context, world.items, count, generator)
    p = expected(world.probability(ServingConfig(**setting)), limits)
    taken = np.take_along_axis(p, item.numpy(), 1)
    np.testing.assert_allclose(log_prob.exp().numpy(), taken, rtol=1e-8)
    for row in range(ROWS):
        seen = np.bincount(item[row].numpy(), minlength=ITEMS).astype(float)
        often = p[row] * count > 10
        parts = [np.append(x[often], x[~often].sum()) for x in (seen, p[row] * count)]
        if parts[1][-1] < 10:
            parts = [x[:-1] for x in parts]
            parts[1] *= parts[0].sum() / parts[1].sum()
        assert chisquare(*parts).pvalue > 1e-6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mode": "top_k"}, "mode top_k has none"),
        ({"top": 3}, "needs a uniform share"),
        ({"new_items": {"feature": "age", "below": 1, "at_least": 0.5, "at_most": 0.1}}, "above"),
    ],
)
def test_limits_that_cannot_hold_are_refused(content: dict[str, Any], message: str) -> None:
    rules = {"feature": "age", "below": 7.0, "at_least": 0.1}
    with pytest.raises(ConfigError, match=message):
        parse_serving({"new_items": rules, **content}, "serving")


def test_training_refuses_a_feature_that_is_no_number(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [make_table(10)], make_schema())
    items = pa.table({"item_id": ["a", "b"]})
    write_catalogue(tmp_path / "items", items, CatalogueSchema())
    config = parse_config(
        {
            "name": "a",
            "data": {"train": str(tmp_path / "log"), "catalogue": str(tmp_path / "items")},
            "serving": {"new_items": {"feature": "age", "below": 7}},
        }
    )
    with pytest.raises(ConfigError, match="'age' is no numeric feature of the catalogue; it has"):
        open_data(config, Progress())


@pytest.mark.parametrize("seed", range(20))
def test_an_item_at_the_threshold_is_not_new(seed: int) -> None:
    ages = np.random.default_rng(seed).integers(0, 90, 300).astype(float)
    table = pa.table({"age": ages})
    spec = FeatureSpec(name="age", kind="numeric")
    mean, scale = {"age": np.asarray(ages.mean())}, {"age": np.asarray(ages.std())}
    encoding = FeatureEncoding((spec,), mean, scale, {})
    values = encoding.encode(table)["age"]
    for below in range(90):
        limits = NewItemsConfig(feature="age", below=below, at_most=0.5)
        np.testing.assert_array_equal(new_numbers(limits, encoding, values), ages < below)


def test_other_settings_change_beside_the_limits() -> None:
    rules = {"feature": "age", "below": 7.0, "at_least": 0.1}
    serving = parse_serving({"new_items": rules}, "serving")
    changed = changed_serving(serving, "temperature=0.5")
    assert changed.new_items == serving.new_items and changed.temperature == 0.5
    assert not serving.is_trained_policy and not serving.is_softmax


def test_a_grid_of_settings_keeps_the_uniform_share_that_limits_need() -> None:
    rules = {"feature": "age", "below": 7.0, "at_least": 0.1}
    serving = parse_serving({"new_items": rules, "top": 3, "uniform": 0.1}, "serving")
    grid = _grid(serving, [0.5, 1.0], [0.0, 0.1])
    assert [changed_serving(serving, one).uniform for one in grid] == [0.1]
    whole = parse_serving({"new_items": rules, "uniform": 0.1}, "serving")
    assert len(_grid(whole, [0.5, 1.0], [0.0, 0.1])) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("setting", SETTINGS[:2], ids=str)
def test_a_context_with_new_items_alone_has_no_limits(
    setting: dict[str, Any], dtype: torch.dtype
) -> None:
    world = World(dtype=dtype)
    rules = {"feature": "age", "below": 7.0, "at_least": 0.0, "at_most": 0.2}
    serving = ServingConfig(**setting, new_items=rules)  # type: ignore[arg-type]
    new = torch.ones(ITEMS, dtype=torch.bool)
    served = served_policy(world.policy, serving, new)
    plain = served_policy(world.policy, ServingConfig(**setting))
    found = served.terms(world.context, world.items, world.action)
    expected_terms = plain.terms(world.context, world.items, world.action)
    assert torch.equal(found.log_prob, expected_terms.log_prob)
    item, log_prob = served.draw(world.context, world.items, 100, torch.Generator().manual_seed(0))
    own = plain.log_prob_at(world.context, world.items, item, found.log_normalizer)
    np.testing.assert_allclose(log_prob.numpy(), own.numpy(), rtol=1e-9)
    logits = torch.from_numpy(world.score).to(dtype)
    dense = served_probabilities(logits, ServingConfig(**setting))
    assert torch.equal(served_probabilities(logits, serving, new), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rare_other_items_get_their_share(dtype: torch.dtype) -> None:
    """Others of probability 1e-9, below the rounding of the new items' sum in float32."""
    world = World(dtype=dtype)
    lower = torch.from_numpy(np.where(NEW, 0.0, -25.0))
    assert world.items.bias is not None
    items = replace(world.items, bias=world.items.bias + lower.to(dtype))
    score = world.score + lower.numpy()
    served = limited((0.0, 0.2), {})
    p = softmax(score, axis=1)
    of_new, of_other = (np.where(kind, p, 0.0) for kind in (NEW, ~NEW))
    p = 0.2 * of_new / of_new.sum(1, keepdims=True) + 0.8 * of_other / of_other.sum(
        1, keepdims=True
    )
    found = served.terms(
        world.context, items, world.action, reward_model=world.factored, entropy=True
    )
    every = torch.arange(ITEMS).expand(ROWS, -1)
    log_prob = served.log_prob_at(world.context, items, every, found.log_normalizer)
    close = {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    np.testing.assert_allclose(log_prob.exp().numpy(), p, rtol=close)
    assert found.expected_reward is not None and found.entropy is not None
    np.testing.assert_allclose(found.expected_reward.numpy(), (p * world.q).sum(1), rtol=close)
    np.testing.assert_allclose(found.entropy.numpy(), -(p * np.log(p)).sum(1), rtol=close)
