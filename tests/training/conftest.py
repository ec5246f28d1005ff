"""A small log on disk, and the configuration of a run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offtower.config import Config, apply_overrides, parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.simulate import SimulatedWorld, WorldSettings


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 rows of 12 items in row groups of 100, with every kind of feature."""
    folder = tmp_path_factory.mktemp("simulated")
    world = SimulatedWorld(12, WorldSettings(4, 4, 4, feature_kinds="all", intercept=0.0), seed=1)
    write_catalogue(folder / "catalogue", world.catalogue_table(), world.catalogue_schema)
    for seed, (name, rows) in enumerate({"train": 600, "validation": 300, "test": 300}.items()):
        write_log(folder / name, world.log(rows, seed=seed), world.log_schema, rows_per_group=100)
    return folder


EVERY_STEP = "training.checkpoint_every_seconds=0.0"
"""For runs that are stopped between steps: otherwise a checkpoint is written after each epoch."""


def make_config(folder: Path, runs: Path, name: str, *overrides: str, **sections: Any) -> Config:
    content = {
        "name": name,
        "runs": str(runs),
        "seed": 3,
        "data": {
            "train": str(folder / "train"),
            "validation": str(folder / "validation"),
            "test": str(folder / "test"),
            "catalogue": str(folder / "catalogue"),
            "window_rows": 250,
        },
        "policy": {
            "embedding_dim": 4,
            "context_tower": {"hidden_layer_sizes": [8], "dropout": 0.2},
            "item_tower": {"hidden_layer_sizes": [8], "unknown_rate": 0.1},
        },
        "reward_model": {
            "kind": "factored",
            "embedding_dim": 4,
            "tower": {"hidden_layer_sizes": [8]},
            "folds": 2,
            "epochs": 2,
            "batch_size": 64,
        },
        "objective": {"name": "dr"},
        "training": {
            "epochs": 2,
            "batch_size": 32,
            "item_chunk": 5,
            "log_every_steps": 5,
            "checkpoint_every_seconds": 1e9,
            "threads": 1,
        },
        **sections,
    }
    return parse_config(apply_overrides(content, overrides))
