"""Runs with sampled terms over items that lie on several workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from offtower.config import Config
from offtower.data import catalogue_index, node_cache
from offtower.errors import ConfigError
from offtower.metrics import read_metrics
from offtower.models import ItemFeatures
from offtower.training.run import train_run
from offtower.training.workers import SINGLE_PROCESS, Workers
from tests.training.conftest import EVERY_STEP
from tests.training.distributed.processes import run_workers
from tests.training.distributed.test_runs import assert_near, config_of, train, train_until
from tests.training.test_resume import assert_same_policy

PROPOSALS = {
    "mixed": ("training.table_updates=rowwise_adagrad", "sampling.exact_every=4"),
    # A catalogue embedding is pending, and another in use, wherever a run is broken off.
    "top_k": ("sampling.top_k=3", "sampling.refresh_steps=3"),
}


def sampled(folder: Path, runs: Path, name: str, strategy: str, proposal: str) -> Config:
    return config_of(
        *(folder, runs, name, strategy, "training.terms=sampled", "sampling.num_samples=5"),
        *(f"sampling.proposal={proposal}", "training.epochs=1", "training.learning_rate=2e-3"),
        *PROPOSALS[proposal],
        EVERY_STEP,
    )


@pytest.mark.parametrize("proposal", ["top_k", pytest.param("mixed", marks=pytest.mark.slow)])
def test_resumed_on_other_numbers_of_workers(
    simulated: Path, tmp_path: Path, proposal: str
) -> None:
    """2 -> 1 -> 3 workers, stopped inside epochs: the policy of a process that has all items."""
    one = sampled(simulated, tmp_path, "one", "replicated", proposal)
    train_run(one)
    many = sampled(simulated, tmp_path, "many", "item_sharded", proposal)
    run_workers(2, train_until, many, 6)
    train_until(SINGLE_PROCESS, many, 14)
    run_workers(3, train_until, many, None)
    assert_near(many.run_directory, one.run_directory, simulated)
    mine, theirs = (read_metrics(c.run_directory / "metrics.jsonl") for c in (one, many))
    for a, b in zip(mine, theirs, strict=True):
        for key in ("step", "epoch", "loss", "entropy", "effective_sample_size"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
        if "validation" in a:
            assert a["validation"]["value"] == pytest.approx(b["validation"]["value"], rel=1e-4)


def train_sharing(workers: Workers, config: Config, cache: Path, steps: int | None) -> None:
    """`train_until` with ids and features in files that the workers share, however few."""
    features: Any = ItemFeatures.from_catalogue
    features.__func__.__defaults__, features.__func__.__kwdefaults__ = (5,), {"share_above": 0}
    catalogue_index.SHARE_ABOVE = 0
    os.environ[node_cache.FOLDER] = str(cache)
    train_until(workers, config, steps)


def test_the_same_workers_give_the_same_bits(simulated: Path, tmp_path: Path) -> None:
    """Broken off inside an epoch, rows of the id table late, and resumed with shared files."""
    whole = sampled(simulated, tmp_path, "whole", "item_sharded", "top_k")
    run_workers(2, train, whole)
    broken = sampled(simulated, tmp_path, "broken", "item_sharded", "top_k")
    run_workers(2, train_until, broken, 9)
    run_workers(2, train_sharing, broken, tmp_path / "cache", None)
    names = sorted(path.name for path in (tmp_path / "cache").glob("*/*.json"))
    assert names.count("catalogue.json") == names.count("features.json") == 1
    assert_same_policy(broken.run_directory, whole.run_directory)


def test_an_array_of_rewards_cannot_be_split(simulated: Path, tmp_path: Path) -> None:
    config = config_of(
        *(simulated, tmp_path, "a", "item_sharded", "training.terms=sampled"),
        *("reward_model.kind=dense", "reward_model.estimator=sklearn.linear_model:Ridge"),
    )
    with pytest.raises(ConfigError, match=r"reward_model\.kind=factored"):
        train_run(config)
