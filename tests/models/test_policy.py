"""Towers and the policy: pluggable modules, temperature, saving, new items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from offtower import TwoTowerPolicyLearner
from offtower.config import PolicyConfig, TowerConfig
from offtower.data import Catalogue, FeatureEncoding, FeatureSpec, TableLog
from offtower.data.encoding import BagTensor, to_tensors
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.errors import ConfigError, RunError
from offtower.models import ItemFeatures, TwoTowerPolicy, load_policy, save_policy
from offtower.models.bag_sums import bag_sums

RNG = np.random.default_rng(0)
CATALOGUE = Catalogue.from_arrays(np.arange(6), {"v": RNG.normal(size=(6, 3))})
CONTEXTS = pa.table(
    {"x": RNG.normal(size=8), "words": [["a", "b"], [], None, ["c"], ["a"], ["b"], ["c"], ["a"]]}
)
CONTEXT_SPECS = (
    FeatureSpec(name="x", kind="numeric"),
    FeatureSpec(name="words", kind="bag"),
)


class AttentionTower(nn.Module):
    """A user's own tower: attention over a bag of words, as news recommenders have it."""

    def __init__(self, encoding: FeatureEncoding, output_dim: int, width: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(encoding.cardinality("words") + 1, width)
        self.query = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width + 1, output_dim)

    def forward(self, features: dict[str, torch.Tensor | BagTensor]) -> torch.Tensor:
        bag, x = features["words"], features["x"]
        assert isinstance(bag, BagTensor) and isinstance(x, torch.Tensor)
        rows = []
        for i in range(len(x)):
            words = self.words(bag.values[bag.offsets[i] : bag.offsets[i + 1]])
            score = torch.softmax(words @ self.query, 0)
            rows.append(torch.cat([score @ words, x[i : i + 1]]))
        return self.out(torch.stack(rows))


def build(**config: object) -> tuple[TwoTowerPolicy, ItemFeatures]:
    context = FeatureEncoding.fit(CONTEXT_SPECS, [CONTEXTS])
    item = FeatureEncoding.fit(CATALOGUE.schema.features, [CATALOGUE.table(0, 6)])
    torch.manual_seed(0)
    policy = TwoTowerPolicy(PolicyConfig(embedding_dim=4, **config), context, item)  # type: ignore[arg-type]
    policy.eval()
    return policy, ItemFeatures.from_catalogue(CATALOGUE, item)


def log_probs(policy: TwoTowerPolicy, items: ItemFeatures) -> torch.Tensor:
    u = policy.embed_contexts(to_tensors(policy.context_encoding.encode(CONTEXTS)))
    return policy.terms(u, policy.embed_items(items), torch.arange(8) % 6).log_prob


def test_a_users_own_module_by_import_path() -> None:
    path = f"{__name__}:AttentionTower"
    policy, items = build(context_tower=TowerConfig(module=path, arguments={"width": 5}))
    log_probs(policy, items).sum().backward()
    assert policy.context_tower.body.query.grad is not None


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (TowerConfig(module="nothing"), "must look like 'package.module:Name'"),
        (TowerConfig(module="no_such_module:X"), "does not import"),
        (TowerConfig(module="offtower.errors:DataError"), "not a subclass of torch.nn.Module"),
        (TowerConfig(module="torch.nn:Linear"), "could not be built as"),
        (TowerConfig(arguments={"a": 1}), "none is named"),
    ],
)
def test_mistakes_in_a_tower_are_explained(tower: TowerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(context_tower=tower)


@pytest.mark.parametrize("bags", [[[3, 1, 3], [], [0]], [[], []], [[2] * 40]])
def test_sums_of_bags_and_their_gradient_are_those_of_counts(bags: list[list[int]]) -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    counts = torch.zeros(len(bags), 5)
    for row, bag in enumerate(bags):
        for value in bag:
            counts[row, value] += 1.0
    values = torch.tensor([value for bag in bags for value in bag], dtype=torch.int64)
    offsets = torch.tensor(np.cumsum([0, *map(len, bags)]))
    total = bag_sums(weight, values, offsets)
    torch.testing.assert_close(total, counts @ weight)
    upstream = torch.randn(len(bags), 3)
    total.backward(upstream)
    torch.testing.assert_close(weight.grad, counts.T @ upstream)


@pytest.mark.parametrize("bag", ["mean", "root"])
def test_bags_are_joined_alike_in_training_and_out_of_it(bag: str) -> None:
    policy, _ = build(context_tower=TowerConfig(bag=bag, unknown_rate=0.0))
    features = to_tensors(policy.context_encoding.encode(CONTEXTS))
    out_of_it = policy.embed_contexts(features)
    policy.train()
    torch.testing.assert_close(policy.embed_contexts(features), out_of_it)


def test_tables_in_the_output_are_added_to_what_layers_make_of_numbers() -> None:
    tower = TowerConfig(hidden_layer_sizes=(), tables="output", bag="root", unknown_rate=0.0)
    policy, _ = build(context_tower=tower)
    body = policy.context_tower.body.members[0]
    features = to_tensors(policy.context_encoding.encode(CONTEXTS))
    table, linear = body.encoder.tables["feature_0"].weight, body.layers[0]
    assert table.shape[1] == 4 and linear.weight.shape == (4, 1)
    words = {"a": table[1], "b": table[2], "c": table[3]}
    for row, (bag, x) in enumerate(zip(CONTEXTS["words"].to_pylist(), features["x"], strict=True)):
        wanted = x * linear.weight[:, 0] + linear.bias
        if bag:
            wanted = wanted + sum(words[word] for word in bag) / len(bag) ** 0.5
        torch.testing.assert_close(policy.embed_contexts(features)[row], wanted)
    # Layers that would have nothing to read.
    deep = TowerConfig(hidden_layer_sizes=(5,), tables="output")
    words_only = FeatureEncoding.fit(CONTEXT_SPECS[1:], [CONTEXTS])
    with pytest.raises(ConfigError, match="leaves the hidden layers nothing to read"):
        TwoTowerPolicy(PolicyConfig(context_tower=deep), words_only, policy.item_encoding)


@pytest.mark.parametrize("item_bias", [False, True])
def test_learned_temperature_equals_a_fixed_one(item_bias: bool) -> None:
    fixed, items = build(temperature=0.5, item_bias=item_bias)
    learned, _ = build(temperature=0.5, item_bias=item_bias, learn_temperature=True)
    torch.testing.assert_close(log_probs(learned, items), log_probs(fixed, items))
    log_probs(learned, items).sum().backward()
    assert learned.log_temperature.grad is not None
    assert learned.log_temperature.grad.abs() > 0


def test_saved_policy_loads_without_anything_else(tmp_path: Path) -> None:
    policy, items = build(item_bias=True)
    policy.eval()
    save_policy(tmp_path / "policy", policy, {"note": "x"})
    loaded, facts = load_policy(tmp_path / "policy")
    assert facts == {"note": "x"}
    torch.testing.assert_close(log_probs(loaded, items), log_probs(policy, items), rtol=0, atol=0)


def test_damaged_policies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Did training finish"):
        load_policy(tmp_path)
    policy, _ = build()
    save_policy(tmp_path / "policy", policy, {})
    weights = tmp_path / "policy" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match="is truncated"):
        load_policy(tmp_path / "policy")
    (tmp_path / "policy" / "policy.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        load_policy(tmp_path / "policy")


def test_new_items_are_scored_from_their_features_better_than_as_unknown() -> None:
    """Items that training never saw: features tell them apart, the unknown row cannot.

    Expected reward of item a in context x is sigmoid(3 <x, f_a>); items 30 to 39 are new. The gap
    to the unknown row is over 0.1 on every one of 20 seeds; the test asks for half of that on one.
    """
    rng = np.random.default_rng(4)
    features = rng.normal(size=(40, 3)).astype(np.float32)
    seen, n = 30, 6000
    context = rng.normal(size=(n, 3)).astype(np.float32)
    action = rng.integers(0, seen, n)
    reward = rng.random(n) < 1 / (1 + np.exp(-3 * (context * features[action]).sum(1)))
    specs = (
        FeatureSpec(name="item_id", kind="category"),
        FeatureSpec(name="v", kind="vector"),
    )

    def vectors(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])

    def catalogue(ids: np.ndarray, values: np.ndarray) -> Catalogue:
        return Catalogue.from_table(
            pa.table({"item_id": ids, "v": vectors(values)}), CatalogueSchema(features=specs)
        )

    log = TableLog(
        pa.table(
            {
                "x": vectors(context),
                "action": action,
                "reward": reward.astype(float),
                "pscore": np.full(n, 1 / seen),
            }
        ),
        LogSchema(context=(FeatureSpec(name="x", kind="vector"),)),
    )
    learner = TwoTowerPolicyLearner(
        3, 3, objective="regression", epochs=30, hidden_layer_sizes=(16,), random_state=1
    ).fit((log, catalogue(np.arange(seen), features[:seen])))
    policy = learner.policy_
    test = rng.normal(size=(2000, 3)).astype(np.float32)
    truth = 1 / (1 + np.exp(-3 * test @ features[seen:].T))

    def value(ids: np.ndarray, values: np.ndarray) -> float:
        encoded = policy.item_encoding.encode(catalogue(ids, values).table(0, 10))
        with torch.no_grad():
            u = policy.embed_contexts(
                to_tensors(policy.context_encoding.encode(pa.table({"x": vectors(test)})))
            )
            v = policy.embed_items(ItemFeatures(encoded, 10)).embedding
        pi = torch.softmax(u @ v.T, 1).numpy()
        return float((pi * truth).sum(1).mean())

    with_features = value(np.arange(seen, 40), features[seen:])
    as_unknown = value(np.arange(seen, 40), np.tile(features[:seen].mean(0), (10, 1)))
    assert as_unknown == pytest.approx(truth.mean(), abs=0.01)
    assert with_features > as_unknown + 0.05
