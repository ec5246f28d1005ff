"""A uniform start: probabilities before the first step, and what is learned from there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offtower.config import Config, parse_config
from offtower.config.files import config_fingerprint, to_dict
from offtower.data.encoding import to_tensors
from offtower.errors import ConfigError
from offtower.metrics import read_metrics
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress
from offtower.seeds import seed_torch
from offtower.training.run import build_trainer, train_run
from offtower.training.setup import build_setup
from offtower.training.trainer import Trainer
from offtower.training.workers import SINGLE_PROCESS
from tests.training.conftest import make_config

LINEAR: dict[str, Any] = {"hidden_layer_sizes": [], "unknown_rate": 0.0}
TABLES: dict[str, Any] = {**LINEAR, "tables": "output"}
HIDDEN: dict[str, Any] = {"hidden_layer_sizes": [8], "dropout": 0.2}
POLICIES: dict[str, dict[str, Any]] = {
    "hidden": {"context_tower": HIDDEN, "item_tower": HIDDEN},
    "linear": {"context_tower": LINEAR, "item_tower": LINEAR},
    "tables: output": {"context_tower": TABLES, "item_tower": TABLES},
    "tables: output, hidden": {
        "context_tower": {**HIDDEN, "tables": "output"},
        "item_tower": {**HIDDEN, "tables": "output", "bag": "root"},
    },
    "members": {
        "context_tower": {**HIDDEN, "members": 2},
        "item_tower": {**TABLES, "members": 2, "bias_scale": 3.0},
    },
    "normalized items": {"context_tower": HIDDEN, "item_tower": {**HIDDEN, "normalize": True}},
    "learned temperature": {
        "context_tower": HIDDEN,
        "item_tower": HIDDEN,
        "learn_temperature": True,
        "temperature": 0.3,
    },
}


def config_of(simulated: Path, runs: Path, *overrides: str, **policy: Any) -> Config:
    return make_config(
        *(simulated, runs, "a", "objective.name=ips", "training.initialization=uniform"),
        *overrides,
        policy={"embedding_dim": 4, "item_bias": True, **policy},
    )


def probabilities(trainer: Trainer, data: PreparedData) -> Tensor:
    """(rows of a batch, N), by a naive softmax."""
    policy = trainer.policy.eval()
    with trainer.reader() as reader:
        batch = next(iter(reader.epoch(0)))
    with torch.no_grad():
        items = policy.embed_items(data.items)
        u = policy.embed_contexts(to_tensors(batch.rows.context))
        logit = u @ items.embedding.T / policy.temperature
        return torch.softmax(logit if items.bias is None else logit + items.bias, dim=1)


@pytest.fixture(scope="module")
def data(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return open_data(config_of(simulated, tmp_path_factory.mktemp("data")), Progress())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_item_is_equally_likely_before_training(
    simulated: Path, tmp_path: Path, data: PreparedData, name: str, bias: bool
) -> None:
    config = config_of(simulated, tmp_path, **{**POLICIES[name], "item_bias": bias})
    trainer = build_trainer(config, data, None)
    found = probabilities(trainer, data)
    assert found.shape[1] == 12
    torch.testing.assert_close(found, torch.full_like(found, 1 / 12), rtol=1e-6, atol=0)
    # The items are as random as ever, so that the first step has a direction.
    plain = config_of(
        *(simulated, tmp_path, "training.initialization=random"),
        **{**POLICIES[name], "item_bias": bias},
    )
    other = build_trainer(plain, data, None)
    assert probabilities(other, data).std() > 1e-3
    torch.testing.assert_close(
        trainer.policy.eval().embed_items(data.items).embedding,
        other.policy.eval().embed_items(data.items).embedding,
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("name", POLICIES)
def test_it_learns_from_there(simulated: Path, tmp_path: Path, name: str) -> None:
    more = ("training.learning_rate=0.03", "training.epochs=4", "training.measure_terms=true")
    fewer = ("data.validation=null", "training.log_every_steps=1000")
    config = config_of(simulated, tmp_path, *more, *fewer, **POLICIES[name])
    train_run(config)
    lines = read_metrics(config.run_directory / "metrics.jsonl")
    first = next(line for line in lines if line["kind"] == "step")
    assert first["entropy"] == pytest.approx(math.log(12), abs=1e-6)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert epochs[-1]["entropy"] < math.log(12) - 0.05
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.02


def test_the_default_start_has_the_bits_that_it_had(
    simulated: Path, tmp_path: Path, data: PreparedData
) -> None:
    config = make_config(simulated, tmp_path, "a", "objective.name=ips")
    policy = build_trainer(config, data, None).policy
    seed_torch(config.seed, "policy")
    drawn = TwoTowerPolicy(config.policy, data.context_encoding, data.item_encoding)
    for (name, one), two in zip(policy.named_parameters(), drawn.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", ["hidden", "tables: output"])
def test_items_spread_over_workers_start_so_too(
    simulated: Path, tmp_path: Path, data: PreparedData, name: str
) -> None:
    config = config_of(*(simulated, tmp_path, "training.strategy=item_sharded"), **POLICIES[name])
    setup = build_setup(config, data, None, SINGLE_PROCESS, Progress())
    assert setup.shard is not None
    with torch.no_grad():
        items = setup.policy.eval().embed_items(setup.shard.items)
    assert items.bias is not None and not items.bias.any() and items.embedding.std() > 1e-3
    whole = setup.whole_policy()
    assert whole is not None
    trainer = setup.trainer()
    trainer.policy = whole
    found = probabilities(trainer, data)
    torch.testing.assert_close(found, torch.full_like(found, 1 / 12), rtol=1e-6, atol=0)


MODULE = "torch.nn:Identity"


@pytest.mark.parametrize(
    ("overrides", "policy", "message"),
    [
        (["training.warm_start=runs/x/policy"], {}, "both set the initial weights"),
        ([], {"context_tower": {"normalize": True}}, "initial_temperature for an almost uniform"),
        ([], {"context_tower": {"module": MODULE}}, "last layer of the module 'torch.nn:Iden"),
        ([], {"item_tower": {"module": MODULE}}, "policy.item_tower"),
    ],
)
def test_refusals(
    simulated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    policy: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    stored = tmp_path / "runs" / "x" / "policy" / "policy.json"
    stored.parent.mkdir(parents=True)
    stored.touch()
    config = config_of(simulated, tmp_path, *overrides, **policy)
    with pytest.raises(ConfigError, match=message):
        train_run(config)


def test_initialization_and_temperature_change_the_fingerprint() -> None:
    base = {"name": "x", "data": {"train": "a", "catalogue": "b"}}
    config = parse_config(base)
    assert to_dict(config)["training"]["initialization"] == "random"
    found = config_fingerprint(config)
    for training in ({"initialization": "uniform"}, {"initial_temperature": 2.0}):
        assert config_fingerprint(parse_config({**base, "training": training})) != found
