"""Logs and catalogues of two days: items and users come and go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.config import Config, apply_overrides, parse_config
from offtower.data import write_catalogue, write_log
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema

ITEMS = CatalogueSchema(
    item_id="item",
    features=(
        FeatureSpec(name="item", kind="category"),
        FeatureSpec(name="shape", kind="vector", dim=2),
        FeatureSpec(name="brand", kind="category"),
    ),
)
ROWS = LogSchema(
    context=(
        FeatureSpec(name="user", kind="category"),
        FeatureSpec(name="age", kind="numeric"),
    ),
    action="item",
    reward="reward",
    pscore="pscore",
)


def catalogue(numbers: range) -> pa.Table:
    shape = np.random.default_rng(0).normal(size=(100, 2))[list(numbers)]
    return pa.table(
        {
            "item": [f"i{n:02d}" for n in numbers],
            "shape": list(shape),
            "brand": [f"b{n % 3 + (3 if n >= 20 else 0)}" for n in numbers],
        }
    )


def log(rows: int, items: range, users: range, seed: int) -> pa.Table:
    """Uniform draws of the items, rewarded by a product of the user's number and the item's."""
    rng = np.random.default_rng(seed)
    item, user = rng.choice(list(items), rows), rng.choice(list(users), rows)
    reward = rng.random(rows) < np.where((item + user) % 2 == 0, 0.6, 0.2)
    return pa.table(
        {
            "user": [f"u{n}" for n in user],
            "age": rng.normal(size=rows),
            "item": [f"i{n:02d}" for n in item],
            "reward": reward.astype(np.float64),
            "pscore": np.full(rows, 1.0 / len(items)),
        }
    )


@dataclass(frozen=True)
class Days:
    """Folders of two days."""

    folder: Path

    def config(self, day: int, runs: Path, *overrides: str, **sections: Any) -> Config:
        """The run of a day; that of day 1 goes on from that of day 0."""
        content = {
            "name": f"day-{day}",
            "runs": str(runs),
            "seed": 3 + day,
            "data": {
                "train": str(self.folder / f"log-{day}"),
                "catalogue": str(self.folder / f"catalogue-{day}"),
                "window_rows": 100,
            },
            "policy": {
                "embedding_dim": 4,
                "item_bias": True,
                "context_tower": {"hidden_layer_sizes": [8]},
                "item_tower": {"hidden_layer_sizes": [8]},
            },
            "objective": {"name": "ips"},
            "training": {
                "epochs": 2,
                "batch_size": 50,
                "gradient_clip": None,
                "checkpoint_every_seconds": 1e6,
                "measure_terms": False,
                "threads": 1,
            },
            "incremental": {"evict_after": 1},
            **sections,
        }
        before = [f"incremental.from_run={runs / f'day-{day - 1}'}"] if day else []
        return parse_config(apply_overrides(content, [*before, *overrides]))


def write_days(folder: Path) -> Days:
    """Day 0: items 0..19, users 0..9. Day 1: items 4..23 and users 2..11."""
    for day, (items, users) in enumerate(((range(20), range(10)), (range(4, 24), range(2, 12)))):
        write_catalogue(folder / f"catalogue-{day}", catalogue(items), ITEMS)
        rows = log(200, items, users, seed=day)
        write_log(folder / f"log-{day}", [rows], ROWS, rows_per_group=50)
    return Days(folder)
