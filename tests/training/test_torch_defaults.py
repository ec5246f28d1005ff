"""Training and evaluation do not depend on torch's default dtype and device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offtower.evaluation.run import evaluate_runs
from offtower.models.store import load_policy
from offtower.run_directory import RunDirectory
from offtower.training.run import train_run
from tests.torch_defaults import DEFAULTS, torch_default
from tests.training.conftest import make_config

RUNS: dict[str, tuple[str, ...]] = {
    "exact": ("policy.learn_temperature=true", "policy.item_bias=true"),
    "sampled": (
        *("training.terms=sampled", "training.table_updates=lazy_adamw"),
        *("sampling.proposal=top_k", "sampling.num_samples=6", "sampling.top_k=3"),
        *("training.weight_average=0.5", "objective.name=snips"),
    ),
    "potec": ("objective.name=potec", "policy.item_bias=true"),
}


def outcome(simulated: Path, runs: Path, name: str) -> tuple[dict[str, Tensor], Any]:
    """Weights of a policy trained for an epoch, and its evaluation."""
    config = make_config(simulated, runs, name, "training.epochs=1", *RUNS[name])
    train_run(config)
    policy, _ = load_policy(RunDirectory(config.run_directory).policy)
    found = evaluate_runs([config.run_directory])
    return policy.state_dict(), json.loads(json.dumps(found.to_dict()["policies"], default=str))


@pytest.fixture(scope="module", params=list(RUNS))
def wanted(
    request: pytest.FixtureRequest, simulated: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Tensor], Any]:
    """A run's name and its outcome under torch's own defaults."""
    name: str = request.param
    return name, *outcome(simulated, tmp_path_factory.mktemp("wanted"), name)


@pytest.mark.parametrize("default", DEFAULTS)
def test_training_and_evaluation_do_not_depend_on_torch_defaults(
    wanted: tuple[str, dict[str, Tensor], Any], simulated: Path, tmp_path: Path, default: str
) -> None:
    name, weights, evaluation = wanted
    with torch_default(default):
        found, found_evaluation = outcome(simulated, tmp_path, name)
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert found[key].dtype == value.dtype and found[key].device == value.device
        assert torch.equal(found[key], value), key
    assert found_evaluation == evaluation
