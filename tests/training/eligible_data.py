"""A small world in which rows have different eligible items, and its exact sets."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.config import parse_config
from offtower.data.catalogue import Catalogue, write_catalogue
from offtower.data.log import TableLog, write_log
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate.features import vector_array
from offtower.prepare import PreparedData, prepare
from offtower.progress import Progress
from offtower.retrieval import ExportOptions, IndexOptions, export_run
from offtower.training.run import train_run
from tests.lighter import without_graphs

N = 70
REGIONS = ("de", "fr", "it", "es")
FORMS: dict[str, Any] = {
    "attribute": {"item": "regions", "context": "region"},
    "interval": {"from": "listed", "until": "gone"},
    "exclude": {"column": "seen"},
    "candidates": {"column": "shortlist"},
}


def schemas(*forms: str) -> tuple[LogSchema, CatalogueSchema]:
    x = FeatureSpec(name="x", kind="vector")
    section = {form: FORMS[form] for form in forms} if forms else None
    log = LogSchema.from_dict({"timestamp": "time", "eligible": section, "context": []})
    log = LogSchema(context=(x,), timestamp="time", eligible=log.eligible)
    features = (x, FeatureSpec(name="item_id", kind="category"))
    return log, CatalogueSchema(features=features).keeping(log.eligible)


@cache
def items(seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    regions = [
        sorted({"de", *rng.choice(REGIONS, rng.integers(0, 3))})
        if i < 4
        else rng.choice(REGIONS, rng.integers(1, 3), replace=False).tolist()
        for i in range(N)
    ]
    first = np.where(np.arange(N) < 4, 0, rng.integers(0, 60, N))
    return pa.table(
        {
            "item_id": np.arange(N),
            "x": vector_array(rng.standard_normal((N, 3)).astype(np.float32)),
            "regions": regions,
            "listed": first,
            "gone": first + rng.integers(30, 100, N),
        }
    )


def log(n: int, forms: tuple[str, ...], seed: int = 1) -> tuple[pa.Table, np.ndarray]:
    """Rows logged uniformly over their eligible items, and (n, N) which items these are."""
    rng = np.random.default_rng(seed)
    catalogue = items().to_pydict()
    region, time = rng.choice(REGIONS, n), rng.integers(0, 110, n)
    seen = [rng.choice(N, 12, replace=False).tolist() for _ in range(n)]
    shortlist = [rng.choice(N, 25, replace=False).tolist() for _ in range(n)]
    sets = np.ones((n, N), dtype=bool)
    for i in range(n):
        if "attribute" in forms:
            sets[i] &= [region[i] in one for one in catalogue["regions"]]
        if "interval" in forms:
            sets[i] &= [
                a <= time[i] < b
                for a, b in zip(catalogue["listed"], catalogue["gone"], strict=True)
            ]
        if "exclude" in forms:
            sets[i, seen[i]] = False
        if "candidates" in forms:
            sets[i] &= np.isin(np.arange(N), shortlist[i])
    kept = np.flatnonzero(sets.any(axis=1))
    action = [int(rng.choice(np.flatnonzero(sets[i]))) for i in kept]
    table = pa.table(
        {
            "x": vector_array(rng.standard_normal((len(kept), 3)).astype(np.float32)),
            "action": action,
            "reward": (rng.random(len(kept)) < 0.4).astype(np.float32),
            "pscore": 1.0 / sets[kept].sum(axis=1),
            "region": region[kept],
            "time": time[kept],
            "seen": [seen[i] for i in kept],
            "shortlist": [shortlist[i] for i in kept],
        }
    )
    return table, sets[kept]


def prepared(n: int, *forms: str) -> tuple[PreparedData, np.ndarray]:
    """A log in memory with its sets."""
    table, sets = log(n, forms)
    log_schema, catalogue_schema = schemas(*forms)
    opened = TableLog(table, log_schema)
    return prepare(opened, None, Catalogue(items(), catalogue_schema), Progress()), sets


def exported_run(folder: Path, forms: tuple[str, ...], index: IndexOptions | None) -> Path:
    """Train a policy on a log with these forms, and export it with an index or without."""
    table, _ = log(300, forms)
    log_schema, catalogue_schema = schemas(*forms)
    write_log(folder / "log", [table], log_schema)
    write_catalogue(folder / "catalogue", items(), catalogue_schema)
    config = parse_config(
        {
            "name": "run",
            "runs": str(folder / "runs"),
            "data": {"train": str(folder / "log"), "catalogue": str(folder / "catalogue")},
            "policy": {"embedding_dim": 4},
            "objective": {"name": "ips"},
            "training": {"epochs": 1, "threads": 1},
        },
        source="test",
    )
    train_run(config)
    with without_graphs():
        export_run(config.run_directory, ExportOptions(index=index, contexts=50))
    return config.run_directory
