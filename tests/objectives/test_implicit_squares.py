"""Implicit squares: against enumeration, and against the closed form of its optimum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.config import parse_config
from offtower.data.catalogue import Catalogue
from offtower.data.log import TableLog
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.errors import ConfigError
from offtower.objectives import ItemScores, LoggedRows, Reduction, make_objective
from offtower.ops.square_sum import square_sum
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress
from offtower.training.auto.candidates import make_candidates
from offtower.training.run import build_trainer

ROWS, ITEMS, DIM = 9, 6, 4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.7, "max_weight": 3.0, "smoothing": 0.5}])
def test_loss_and_gradients_by_enumeration(settings: dict[str, float], bias: bool) -> None:
    rng = np.random.default_rng(4)
    u, v, b = (
        torch.from_numpy(rng.normal(size=s)).requires_grad_()
        for s in ((ROWS, DIM), (ITEMS, DIM), ITEMS)
    )
    reward = torch.from_numpy(rng.choice([0.0, 0.5, 1.0, 2.0], ROWS))
    pscore = torch.from_numpy(rng.uniform(0.02, 1.0, ROWS))
    action = torch.from_numpy(rng.integers(0, ITEMS, ROWS))
    score = u @ v.T + (b if bias else 0.0)
    own = score[torch.arange(ROWS), action]
    alpha, c = settings.get("alpha", 0.1), settings.get("max_weight", 10.0)
    expected = torch.tensor(0.0, dtype=torch.float64)
    for i in range(ROWS):
        if reward[i] == 0.0:
            continue
        expected = expected + alpha * sum(score[i, a] ** 2 for a in range(ITEMS)) / ROWS
        weight = min(float(pscore[i]) ** -settings.get("smoothing", 1.0), c)
        expected = expected + weight * reward[i] * (1.0 - own[i]) ** 2 / ROWS
    leaves = [u, v, b] if bias else [u, v]
    wanted = torch.autograd.grad(expected, leaves, retain_graph=True)
    squares = square_sum(u, v, b if bias else None)
    rows = LoggedRows(reward, ItemScores(own, squares), pscore)
    result = make_objective("implicit_squares", settings)(rows, Reduction(ROWS))
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert result.value.item() == pytest.approx(-expected.item(), rel=1e-12)
    for found, want in zip(torch.autograd.grad(result.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-11)


def test_sums_of_low_precision_embeddings_are_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(5, 16, generator=generator).bfloat16()
    v = torch.randn(20_000, 16, generator=generator).bfloat16()
    found = square_sum(u, v)
    assert found.dtype == torch.float32
    wanted = (u.double() @ v.double().T).square().sum(dim=1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def id_log(rows: int = 400, users: int = 6) -> TableLog:
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "user": [f"u{k}" for k in rng.integers(0, users, rows)],
            "action": rng.integers(0, 5, rows),
            "reward": rng.integers(0, 2, rows).astype(np.float64),
            "pscore": rng.choice([0.05, 0.2, 0.5], rows),
        }
    )
    schema = LogSchema(
        action="action",
        reward="reward",
        pscore="pscore",
        context=(FeatureSpec(name="user", kind="category"),),
    )
    return TableLog(table, schema)


def id_data(log: TableLog, items: int = 5) -> PreparedData:
    features = (FeatureSpec(name="item_id", kind="category"),)
    catalogue = Catalogue.from_table(
        pa.table({"item_id": np.arange(items)}),
        CatalogueSchema(item_id="item_id", features=features),
    )
    return prepare(log, None, catalogue, Progress())


def config_of(**training: object):  # type: ignore[no-untyped-def]
    tower = {"hidden_layer_sizes": [], "tables": "output", "unknown_rate": 0.0}
    return parse_config(
        {
            "name": "x",
            "data": {"train": "memory", "catalogue": "memory"},
            "policy": {"embedding_dim": 8, "context_tower": tower, "item_tower": tower},
            "objective": {"name": "implicit_squares", "arguments": {"alpha": 0.5}},
            "training": {
                "epochs": 1500,
                "batch_size": 400,
                "learning_rate": 0.03,
                "weight_decay": 0.0,
                "decay": "linear",
                "item_chunk": 2,
                "log_every_steps": None,
                "measure_terms": False,
                **training,
            },
        }
    )


def test_training_ends_at_the_closed_form() -> None:
    """Users and ids alone, of full rank: each pair has a score of its own, and the optimum is
    s(x, a) = W / (W + alpha n), W the weights of the pair's rewarded rows and n those of x."""
    log = id_log()
    data = id_data(log)
    trainer = build_trainer(config_of(), data, None)
    trainer.fit()
    table = log.table.to_pandas()
    found = trainer.policy.embed_items(data.items).embedding.detach()
    for user, rows in table[table.reward > 0].groupby("user"):
        one = pa.table({"user": [user]})
        encoded = trainer.policy.context_encoding.encode(one)
        context = {k: torch.from_numpy(value) for k, value in encoded.items()}
        score = trainer.policy.embed_contexts(context).detach() @ found.T
        weight = np.minimum(1.0 / rows.pscore, 10.0)
        of_item = [float(weight[rows.action == a].sum()) for a in range(5)]
        wanted = torch.tensor([w / (w + 0.5 * len(rows)) for w in of_item])
        torch.testing.assert_close(score[0], wanted, rtol=0, atol=0.01)


def test_what_it_cannot_do_is_refused() -> None:
    log = id_log(50)
    data = id_data(log)
    with pytest.raises(ConfigError, match="draws cannot estimate"):
        build_trainer(config_of(terms="sampled"), data, None)
    with pytest.raises(ConfigError, match="whole catalogue on each worker"):
        build_trainer(config_of(strategy="item_sharded"), data, None)


def test_auto_leaves_it_out_where_terms_are_sampled(tmp_path: Path) -> None:
    data = id_data(id_log(50))
    base = {"name": "x", "data": {"train": "memory", "catalogue": "memory"}}
    plain = make_candidates(parse_config(base), data)
    assert plain[0].name == "implicit_linear"
    sampled = {**base, "training": {"terms": "sampled"}}
    assert [c.name for c in make_candidates(parse_config(sampled), data)] == [
        c.name for c in plain[1:]
    ]
    named = {**sampled, "auto": {"candidates": ["implicit_linear"]}}
    with pytest.raises(ConfigError, match="draws cannot estimate"):
        make_candidates(parse_config(named), data)


@pytest.mark.parametrize(
    ("users", "items", "rank"), [(900, 1_000, 256), (900, 32_769, 128), (90, 1_000, 91)]
)
def test_autos_rank_is_as_high_as_catalogue_and_contexts_allow(
    users: int, items: int, rank: int
) -> None:
    """And no higher than either has values, the unknown one included."""
    log = id_log(20 * users, users)
    config = parse_config({"name": "x", "data": {"train": "memory", "catalogue": "memory"}})
    candidate = make_candidates(config, id_data(log, items))[0]
    assert candidate.name == "implicit_linear"
    assert candidate.policy.embedding_dim == rank
