"""Folds of models that several workers fit are those of one process, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offtower.checksums import write_checksums
from offtower.config import Config
from offtower.crossfit.reward_model import obtain_reward_model, store_folds
from offtower.errors import RunError
from offtower.prepare import open_data
from offtower.progress import Progress
from offtower.training.two_stage import fit_logging_clusters
from offtower.training.workers import Workers
from tests.jobs.conftest import Recorded
from tests.mappers import content
from tests.training.conftest import make_config
from tests.training.distributed.processes import of_each_size


def config_of(folder: Path, runs: Path, name: str) -> Config:
    return make_config(
        folder, runs, name, "reward_model.folds=2", "reward_model.epochs=1", "training.epochs=1"
    )


def fits(workers: Workers, config: Config) -> Any:
    """Fit the reward model and the model of the logging policy; return bytes and weights."""
    target = config.run_directory / str(workers.size) / "reward_model"
    data = open_data(config, Progress())
    fit = (config.reward_model, data, config.seed, Progress(), target)
    workers.on_each(lambda: store_folds(*fit, (workers.rank, workers.size)))
    assert len(list(target.parent.glob("reward_model.folds/*"))) == 2
    workers.barrier()
    workers.first_then_all(lambda: obtain_reward_model(*fit))
    assert not target.with_name("reward_model.folds").exists()
    label = torch.arange(data.catalogue.num_items) % 4
    towers = fit_logging_clusters(config, data, label, 4, Progress(), workers)
    return content(target), [tower.state_dict() for tower in towers]


def test_folds_of_several_workers_are_those_of_one(simulated: Path, tmp_path: Path) -> None:
    """Two folds: of three workers one has none."""
    config = config_of(simulated, tmp_path, "a")
    of_each_size(3, fits, tmp_path, config)
    obtain(config)
    wanted = content(config.run_directory / "reward_model")
    towers = clusters_of_one(config)
    for path in sorted(tmp_path.glob("*.pt")):
        found, states = torch.load(path)
        assert found == wanted
        for state, tower in zip(states, towers, strict=True):
            assert all(torch.equal(state[name], tower[name]) for name in tower)
    assert len(list(tmp_path.glob("*.pt"))) == 6


def clusters_of_one(config: Config) -> Any:
    data = open_data(config, Progress())
    label = torch.arange(data.catalogue.num_items) % 4
    found = fit_logging_clusters(config, data, label, 4, Progress())
    return [tower.state_dict() for tower in found]


def obtain(config: Config, progress: Progress | None = None) -> None:
    run = config.run_directory
    data = open_data(config, Progress(), run)
    progress = progress or Progress()
    obtain_reward_model(config.reward_model, data, config.seed, progress, run / "reward_model")


def test_stored_folds_are_not_fitted_again_and_damage_is_found(
    simulated: Path, tmp_path: Path
) -> None:
    config = config_of(simulated, tmp_path, "a")
    run = config.run_directory
    data, target = open_data(config, Progress(), run), run / "reward_model"
    for rank in (0, 1, 0):  # The third call finds everything.
        store_folds(config.reward_model, data, config.seed, Progress(), target, (rank, 2))
    first = run / "reward_model.folds" / "fold_0" / "towers.safetensors"
    kept = first.read_bytes()
    first.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(RunError, match=r"fold_0.*remove the folder: the fold is then fitted again"):
        obtain(config)
    first.write_bytes(kept)
    write_checksums(first.parent)
    shown = Recorded()
    obtain(config, shown)
    assert shown.lines == [] and target.is_dir()
