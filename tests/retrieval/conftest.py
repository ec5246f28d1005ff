"""A small trained run and its export, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offtower.config import parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.simulate import SimulatedWorld, WorldSettings
from offtower.retrieval import ExportOptions, IndexOptions, export_run
from offtower.training.run import train_run
from tests.lighter import without_graphs


@pytest.fixture(scope="session")
def world() -> SimulatedWorld:
    settings = WorldSettings(6, 6, 6, feature_kinds="all", string_ids=True)
    return SimulatedWorld(3000, settings, seed=3)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, world: SimulatedWorld) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    for number, part in enumerate(("train", "test"), start=1):
        write_log(folder / part, world.log(4000, seed=number), world.log_schema)
    config = parse_config(
        {
            "name": "small",
            "runs": str(folder / "runs"),
            "data": {name: str(folder / name) for name in ("train", "test", "catalogue")},
            "policy": {
                "embedding_dim": 12,
                "item_bias": True,
                "temperature": 0.5,
                "context_tower": {"hidden_layer_sizes": [16]},
                "item_tower": {"hidden_layer_sizes": [16]},
            },
            "objective": {"name": "weighted_likelihood"},
            "training": {"epochs": 3, "learning_rate": 0.01, "threads": torch.get_num_threads()},
        }
    )
    train_run(config)
    return config.run_directory


@pytest.fixture(scope="session")
def exported(run: Path) -> Path:
    pytest.importorskip("faiss")
    options = ExportOptions(index=IndexOptions(kind="ivf_flat", k=20), contexts=400, kept=20)
    with without_graphs():
        return export_run(run, options)
