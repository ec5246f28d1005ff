"""A log whose catalogue has item ids as a feature, in no order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from offtower.data import write_catalogue, write_log
from offtower.data.schema import FeatureSpec
from offtower.data.simulate import SimulatedWorld, WorldSettings


def write_world(folder: Path, rows: int = 600) -> Path:
    """So many rows of 14 items in row groups of 100, with every kind of feature, and item ids."""
    world = SimulatedWorld(14, WorldSettings(4, 4, 4, feature_kinds="all", intercept=0.0), seed=1)
    schema = world.catalogue_schema
    ids = FeatureSpec(name="id", kind="category", column="item_id", embedding_dim=3)
    table = world.catalogue_table().take(np.random.default_rng(5).permutation(14))
    write_catalogue(folder / "catalogue", table, replace(schema, features=(*schema.features, ids)))
    sizes = {"train": rows, "validation": rows // 2, "test": rows // 2}
    for seed, (name, size) in enumerate(sizes.items()):
        write_log(folder / name, world.log(size, seed=seed), world.log_schema, rows_per_group=100)
    return folder
