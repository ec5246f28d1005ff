"""Encoders of histories against plain loops in float64, and tables that two towers share."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offtower.config import HistoryConfig, PolicyConfig, TowerConfig
from offtower.data.encoding import BagTensor, FeatureEncoding, to_tensors
from offtower.data.histories import AGE, DWELL, EVENT, HistoryBasis
from offtower.data.schema import FeatureSpec
from offtower.errors import ConfigError
from offtower.models.features import FeatureTensors
from offtower.models.histories import HistoryEncoder, ItemTable
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.row_draws import RowDraws
from offtower.training.auto.ensemble import join
from offtower.training.initialization import initialize_uniform

ITEMS = [f"i{number}" for number in np.random.default_rng(1).permutation(9)]
SPEC = FeatureSpec(name="h", kind="history", length=5, times="t", events="e", dwell="d")
KINDS = [
    ("mean", "softmax"),
    ("attention", "softmax"),
    ("transformer", "softmax"),
    ("transformer", "pointwise"),
]


def contexts(rows: int = 20) -> pa.Table:
    rng = np.random.default_rng(2)
    sizes = rng.integers(0, 8, rows)
    return pa.table(
        {
            "x": rng.normal(size=rows),
            "h": [rng.choice([*ITEMS, "unknown"], n).tolist() for n in sizes],
            "t": [np.sort(rng.integers(0, 1000, n)).tolist() for n in sizes],
            "e": [rng.choice(["buy", "click"], n).tolist() for n in sizes],
            "d": [rng.normal(size=n).tolist() for n in sizes],
            "at": [1001] * rows,
        }
    )


TABLE = contexts()
CONTEXTS = FeatureEncoding.fit(
    (FeatureSpec(name="x", kind="numeric"), SPEC), [TABLE], HistoryBasis(pa.array(ITEMS), "at")
)
OF_ITEMS = FeatureEncoding.fit(
    (FeatureSpec(name="id", kind="category"),), [pa.table({"id": ITEMS})]
)
CATALOGUE = ItemFeatures(OF_ITEMS.encode(pa.table({"id": ITEMS})), len(ITEMS))


def history_config(kind: tuple[str, str], **settings: Any) -> HistoryConfig:
    return HistoryConfig(encoder=kind[0], attention=kind[1], **settings)  # type: ignore[arg-type]


def policy(history: HistoryConfig, **settings: Any) -> TwoTowerPolicy:
    torch.manual_seed(3)
    tower = TowerConfig(hidden_layer_sizes=(8,), history=history, **settings)
    of_items = TowerConfig(hidden_layer_sizes=(8,), **settings)
    config = PolicyConfig(embedding_dim=6, item_bias=True, context_tower=tower, item_tower=of_items)
    return TwoTowerPolicy(config, CONTEXTS, OF_ITEMS)


def encoded(table: pa.Table = TABLE, dtype: torch.dtype = torch.float64) -> FeatureTensors:
    features = to_tensors(CONTEXTS.encode(table))
    return {
        name: value if isinstance(value, BagTensor) else value.to(dtype)
        for name, value in features.items()
    }


def loss(model: TwoTowerPolicy) -> Tensor:
    """Of a likelihood over all items."""
    items = model.embed_items(CATALOGUE)
    assert items.bias is not None
    logit = model.embed_contexts(encoded()) @ items.embedding.T + items.bias
    action = torch.arange(len(logit)) % len(ITEMS)
    return functional.cross_entropy(logit, action)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_shared_table_is_the_sum_of_both_uses(kind: tuple[str, str]) -> None:
    shared = policy(history_config(kind), unknown_rate=0.0).double()
    apart = policy(history_config(kind, items="own"), unknown_rate=0.0).double()
    table = shared.item_tower.bodies[0].encoder.embedding("id")
    assert shared.context_tower.shared_tables[0] is table
    names = [name for name, _ in shared.named_parameters()]
    assert sum("tables" in name for name in names) == 1
    # The same weights, with a copy of the table for the histories.
    state = dict(apart.state_dict())
    (own,) = [name for name in state if name.startswith("context_tower") and "tables" in name]
    state.update(shared.state_dict())
    state[own] = table.weight.detach()
    apart.load_state_dict(state)
    for model in (shared, apart):
        loss(model).backward()
    torch.testing.assert_close(loss(shared), loss(apart), rtol=1e-12, atol=0)
    of_items = apart.item_tower.bodies[0].encoder.embedding("id").weight.grad
    of_histories = dict(apart.named_parameters())[own].grad
    assert table.weight.grad is not None and of_items is not None and of_histories is not None
    assert float(of_histories.abs().max()) > 1e-4
    torch.testing.assert_close(table.weight.grad, of_items + of_histories, rtol=1e-10, atol=1e-14)
    others = dict(apart.named_parameters())
    for name, parameter in shared.named_parameters():
        if parameter is not table.weight:
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind: tuple[str, str]) -> None:
    """Neither the padding nor, in training, hidden events and dropout."""
    model = policy(history_config(kind, dropout=0.3), unknown_rate=0.2)
    model.seed_draws(5)
    features = encoded(dtype=torch.float32)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            whole = model.embed_contexts(features)
            for row in range(len(TABLE)):
                alone = encoded(TABLE.slice(row, 1), torch.float32)
                found = model.embed_contexts(alone, torch.tensor([row]))
                torch.testing.assert_close(found[0], whole[row], rtol=1e-5, atol=1e-6)
    # A copy reads the copied table.
    twin = copy.deepcopy(model)
    assert twin.context_tower.shared_tables[0] is twin.item_tower.bodies[0].encoder.embedding("id")


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_compute_what_they_say(kind: tuple[str, str]) -> None:
    """Against loops over rows, events and heads."""
    torch.manual_seed(4)
    table = ItemTable(torch.nn.Embedding(10, 6).double())
    config = history_config(kind, width=4, layers=1)
    encoder = HistoryEncoder(SPEC, CONTEXTS, table.dim, config, RowDraws()).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    bag = to_tensors(CONTEXTS.encode(TABLE))["h"]
    assert isinstance(bag, BagTensor)
    found = encoder(bag, table)
    for row in range(len(bag)):
        part = slice(int(bag.offsets[row]), int(bag.offsets[row + 1]))
        columns = {name: column[part] for name, column in bag.columns.items()}
        if part.start == part.stop:
            assert not found[row].any()
            continue
        assert encoder.project is not None and encoder.event_types is not None
        assert encoder.dwell is not None
        vectors = (
            encoder.project(table(bag.values[part]))
            + encoder.event_types.weight[columns[EVENT]]
            + columns[DWELL].double()[:, None] * encoder.dwell.weight[:, 0]
        )
        truth = {"mean": mean, "attention": pooled, "transformer": newest_state}[kind[0]]
        torch.testing.assert_close(found[row], truth(encoder, vectors, columns[AGE]))


def mean(encoder: HistoryEncoder, vectors: Tensor, age: Tensor) -> Tensor:
    return vectors.mean(dim=0)


def bias_of(module: Any, head: int, distance: int, elapsed: float) -> Tensor:
    bucket = min(63, math.floor(2 * math.log2(1 + max(elapsed, 0.0))))
    return module.positions[distance, head] + module.times[bucket, head]  # type: ignore[no-any-return]


def pooled(encoder: HistoryEncoder, vectors: Tensor, age: Tensor) -> Tensor:
    pooling = encoder.pooling
    assert pooling is not None
    count, parts = len(vectors), []
    mixed = pooling.keys(vectors)
    for head in range(2):
        key, value = mixed[:, 2 * head : 2 * head + 2], mixed[:, 4 + 2 * head : 6 + 2 * head]
        scores = torch.stack(
            [
                key[j] @ pooling.query[head] / math.sqrt(2)
                + bias_of(pooling.bias, head, count - 1 - j, float(age[j]))
                for j in range(count)
            ]
        )
        parts.append(scores.softmax(0) @ value)
    return pooling.out(torch.cat(parts))  # type: ignore[no-any-return]


def newest_state(encoder: HistoryEncoder, vectors: Tensor, age: Tensor) -> Tensor:
    layer: Any = encoder.layers[0]
    pointwise = hasattr(layer, "most_events")
    count, width = vectors.shape
    mixed = layer.mixed(layer.norm(vectors))
    if pointwise:
        mixed = functional.silu(mixed)
    query, key, value = mixed[:, -3 * width :].split(width, dim=1)
    states = []
    for i in range(count):
        # Time counts to the next event, and for the newest to the row.
        now = float(age[i + 1]) if i + 1 < count else 0.0
        parts = []
        for head in range(2):
            some = slice(2 * head, 2 * head + 2)
            scores = torch.stack(
                [
                    query[i, some] @ key[j, some] / (1.0 if pointwise else math.sqrt(2))
                    + bias_of(layer.bias, head, i - j, float(age[j]) - now)
                    for j in range(i + 1)
                ]
            )
            weight = functional.silu(scores) / 5 if pointwise else scores.softmax(0)
            parts.append(weight @ value[: i + 1, some])
        states.append(torch.cat(parts))
    attended = torch.stack(states)
    if pointwise:
        vectors = vectors + layer.out(mixed[:, :width] * layer.second_norm(attended))
    else:
        vectors = vectors + layer.out(attended)
        hidden = functional.gelu(layer.up(layer.second_norm(vectors)))
        vectors = vectors + layer.down(hidden)
    assert encoder.last is not None
    return encoder.last(vectors)[-1]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] != "attention"])
def test_one_pass_gives_the_states_of_all_prefixes(kind: tuple[str, str]) -> None:
    torch.manual_seed(6)
    table = ItemTable(torch.nn.Embedding(10, 6).double())
    spec = FeatureSpec(name="h", kind="history", length=5)
    encoding = FeatureEncoding.fit((spec,), [TABLE], HistoryBasis(pa.array(ITEMS)))
    config = history_config(kind, heads=3)
    encoder = HistoryEncoder(spec, encoding, table.dim, config, RowDraws()).double()
    bag = to_tensors(encoding.encode(TABLE))["h"]
    assert isinstance(bag, BagTensor)
    states = encoder.states(bag, table)
    for row in range(len(bag)):
        events = bag.values[int(bag.offsets[row]) : int(bag.offsets[row + 1])]
        for end in range(1, len(events) + 1):
            prefix = BagTensor(events[:end], torch.tensor([0, end]))
            torch.testing.assert_close(states[row, end - 1], encoder(prefix, table)[0])


def test_an_ensemble_shares_tables_member_by_member() -> None:
    """Its logits are the mean of the members'."""
    history, members = history_config(("transformer", "softmax")), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        tower = TowerConfig(hidden_layer_sizes=(8,), history=history, bag="root")
        config = PolicyConfig(embedding_dim=6, context_tower=tower, item_tower=tower)
        members.append(TwoTowerPolicy(config, CONTEXTS, OF_ITEMS).eval())
    joined = join(members, inverse_temperature=1.0)
    tables = joined.context_tower.shared_tables
    assert [table.embedding_dim for table in tables] == [16, 16]
    features = encoded(dtype=torch.float32)

    def logit(model: TwoTowerPolicy) -> Tensor:
        items = model.embed_items(CATALOGUE).embedding
        return model.embed_contexts(features) @ items.T / model.temperature

    with torch.no_grad():
        mean = torch.stack([logit(member) for member in members]).mean(dim=0)
        torch.testing.assert_close(logit(joined), mean, rtol=1e-5, atol=1e-6)


def test_uniform_initialization_leaves_histories_a_gradient() -> None:
    tower = TowerConfig(tables="output", history=HistoryConfig(items="own"))
    model = TwoTowerPolicy(PolicyConfig(context_tower=tower), CONTEXTS, OF_ITEMS)
    initialize_uniform(model)
    own = model.context_tower.bodies[0].encoder.embedding("h")
    assert not model.embed_contexts(encoded(dtype=torch.float32)).any()
    assert float(own.weight.abs().max()) > 0.1


def test_widths_and_own_tables() -> None:
    with pytest.raises(ConfigError, match="which is no multiple of history"):
        policy(history_config(("attention", "softmax"), width=5))
    # Tables of 16 numbers, read by three heads of five.
    model = policy(history_config(("transformer", "softmax"), heads=3))
    assert model.context_tower.bodies[0].encoder.width == 16
    # Ids that are not the items' own, or a table of another tower, are not shared.
    other = FeatureEncoding.fit(
        (FeatureSpec(name="genre", kind="category"),), [pa.table({"genre": ["a", "b"]})]
    )
    apart = TwoTowerPolicy(PolicyConfig(embedding_dim=4), CONTEXTS, other)
    assert apart.context_tower.shared_tables == []
    assert apart.context_tower.bodies[0].encoder.embedding("h").num_embeddings == 10


def test_draws_of_one_hash_have_their_rate_and_are_uncorrelated() -> None:
    """Eight draws a row come from two hashes. Each of 36 statistics is about standard normal, so
    that one exceeds 5 by chance in 2 of 100,000 seeds."""
    draws, rows, rate = RowDraws(), 20_000, 0.3
    draws.seed = 3
    cpu = torch.device("cpu")
    found = draws.below(rate, 5, rows, cpu, width=8).double()
    mean = (found.mean(0) - rate) / (rate * (1 - rate) / rows) ** 0.5
    correlation = (torch.corrcoef(found.T) - torch.eye(8)).tril(-1) * rows**0.5
    assert float(mean.abs().max()) < 5 and float(correlation.abs().max()) < 5
    assert not draws.below(0.0, 5, 10, cpu, width=8).any()
    assert draws.below(1.0, 5, 10, cpu, width=8).all()
