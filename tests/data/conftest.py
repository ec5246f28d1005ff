"""A small good log with every kind of column, and its catalogue."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from offtower.data import Catalogue, CatalogueSchema, FeatureSpec, LogSchema

ITEMS = ["shoe", "hat", "coat", "sock"]


def make_schema() -> LogSchema:
    return LogSchema(
        context=(
            FeatureSpec(name="age", kind="numeric"),
            FeatureSpec(name="taste", kind="vector", dim=3),
            FeatureSpec(name="country", kind="category"),
            FeatureSpec(name="tags", kind="bag"),
        ),
        timestamp="time",
        behavior_policy="policy",
        position="position",
        pscore_kind="marginal",
        round_id="round",
        user_id="user",
    )


def make_table(n: int, seed: int = 0) -> pa.Table:
    """n good rows; policies of probability 1/4 for every item; negative times."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "age": rng.normal(40, 10, n),
            "taste": pa.array(rng.normal(size=(n, 3)).tolist(), pa.list_(pa.float32())),
            "country": pa.array([None if i % 7 == 3 else f"c{i % 3}" for i in range(n)]),
            "tags": pa.array(
                [[f"t{j}" for j in range(i % 3)] for i in range(n)], pa.list_(pa.string())
            ),
            "action": [ITEMS[i] for i in rng.integers(0, 4, n)],
            "reward": rng.integers(0, 2, n).astype(np.float64),
            "pscore": np.full(n, 0.25),
            "time": np.arange(n) - 1000,
            "policy": ["a" if i % 2 else "b" for i in range(n)],
            "position": np.zeros(n, dtype=np.int64),
            "round": np.arange(n),
            "user": [f"u{i % 5}" for i in range(n)],
        }
    )


def make_catalogue() -> Catalogue:
    table = pa.table({"item_id": ITEMS, "price": [1.0, 2.0, 3.0, 4.0]})
    return Catalogue(table, CatalogueSchema(features=(FeatureSpec(name="price", kind="numeric"),)))


@pytest.fixture
def schema() -> LogSchema:
    return make_schema()


@pytest.fixture
def catalogue() -> Catalogue:
    return make_catalogue()
