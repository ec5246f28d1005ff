"""Random logs and catalogues for timings; nothing can be learned from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.config import Config, parse_config
from offtower.data import write_log
from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.log import Log, TableLog
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate.features import vector_array

WIDTH = 16
"""Dimension of the feature vectors of contexts and items."""

HIDDEN = 64
"""Width of each tower's hidden layer."""

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "uniform": {"proposal": "uniform"},
    "frequency": {"proposal": "frequency"},
    "in_batch": {"proposal": "in_batch"},
    "mixed": {"proposal": "mixed"},
    "top_k": {"proposal": "top_k"},
}
"""`sampling` section of each mode."""


def make_log(rows: int, items: int, seed: int = 0) -> pa.Table:
    """Return a log in which low item numbers are shown more often; rewards are independent."""
    rng = np.random.default_rng(seed)
    action = np.minimum((items * rng.random(rows) ** 3).astype(np.int64), items - 1)
    return pa.table(
        {
            "context": vector_array(rng.standard_normal((rows, WIDTH), dtype=np.float32)),
            "action": action,
            "reward": (rng.random(rows) < 0.3).astype(np.float32),
            "pscore": np.full(rows, 1.0 / items),
        }
    )


def log_schema() -> LogSchema:
    return LogSchema(context=(FeatureSpec(name="context", kind="vector", dim=WIDTH),))


def make_items(items: int, seed: int = 1) -> pa.Table:
    """Return a catalogue table with one vector per item."""
    rng = np.random.default_rng(seed)
    number = np.arange(items)
    columns = {
        "item_id": number,
        "features": vector_array(rng.standard_normal((items, WIDTH), dtype=np.float32)),
    }
    return pa.table(columns)


def catalogue_schema(id_embedding: int | None) -> CatalogueSchema:
    """Return the schema; `id_embedding` is the width of an item-id embedding, if any."""
    features = [FeatureSpec(name="features", kind="vector", dim=WIDTH)]
    if id_embedding is not None:
        features.append(
            FeatureSpec(name="id", kind="category", column="item_id", embedding_dim=id_embedding)
        )
    return CatalogueSchema(features=tuple(features))


def in_memory(rows: int, items: int) -> tuple[Log, Catalogue]:
    """Return a log and a catalogue in memory."""
    log = TableLog(make_log(rows, items), log_schema())
    return log, Catalogue(make_items(items), catalogue_schema(None), "benchmark")


def write(folder: Path, rows: int, items: int, id_embedding: int | None) -> None:
    """Write a log and a catalogue below `folder`."""
    write_log(folder / "log", [make_log(rows, items)], log_schema())
    table = make_items(items)
    write_catalogue(folder / "catalogue", table, catalogue_schema(id_embedding))


def config(
    mode: str, *, batch: int, dim: int, epochs: int, folder: Path | None = None, **training: Any
) -> Config:
    """Return the configuration of a `weighted_likelihood` run with one hidden layer per tower."""
    root = "in-memory" if folder is None else str(folder)
    tower = {"hidden_layer_sizes": [HIDDEN]}
    return parse_config(
        {
            "name": mode,
            "runs": f"{root}/runs",
            "data": {"train": f"{root}/log", "catalogue": f"{root}/catalogue"},
            "policy": {"embedding_dim": dim, "context_tower": tower, "item_tower": tower},
            "objective": {"name": "weighted_likelihood"},
            "training": {
                "terms": "exact" if mode == "exact" else "sampled",
                "epochs": epochs,
                "batch_size": batch,
                "measure_terms": False,
                "log_every_steps": None,
                **training,
            },
            "sampling": MODES[mode],
        }
    )
