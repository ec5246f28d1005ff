"""Sketches of logs' rows against the exact share of common rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from offtower.data import FeatureSpec, LogSchema
from offtower.data.row_keys import Keys, row_keys
from offtower.data.row_sketch import SIZE, RowSketch, sketched_columns

SCHEMA = LogSchema(
    context=(
        FeatureSpec("x", "vector"),
        FeatureSpec("kind", "category"),
        FeatureSpec("tags", "bag"),
    )
)


def table(n: int, seed: int, levels: int | None = None) -> pa.Table:
    """Rows; with `levels`, of so many equally likely ones."""
    rng = np.random.default_rng(seed)
    drawn = rng.random(n) if levels is None else rng.integers(0, levels, n) / levels
    return pa.table(
        {
            "x": pa.array(np.stack([drawn, drawn**2], axis=1).tolist(), pa.list_(pa.float64())),
            "kind": [f"k{int(value * 7)}" for value in drawn],
            "tags": [["a", "b"][: int(value * 3)] for value in drawn],
            "action": (drawn * 10).astype(np.int64),
            "reward": (drawn > 0.5) * 1.0,
            "pscore": 0.1 + drawn / 2,
        }
    )


def keys_of(rows: pa.Table) -> Keys:
    return row_keys(rows, sketched_columns(SCHEMA), exact=False)


def sketch(*tables: pa.Table) -> RowSketch:
    return RowSketch.of(tables, SCHEMA)


def test_a_hash_depends_on_every_value_and_on_no_type() -> None:
    rows = table(50, 0)
    keys = keys_of(rows)
    assert np.unique(keys).size == 50
    narrow = rows.set_column(5, "pscore", rows["pscore"].cast(pa.float32()))
    whole = narrow.set_column(4, "reward", rows["reward"].cast(pa.int8()))
    named = whole.set_column(1, "kind", rows["kind"].dictionary_encode())
    assert (keys_of(named) == keys).all()
    near = pa.table({"time": [1_790_000_000.0, 1_790_000_001.0, 1_790_000_001.0]})
    ids = near.set_column(0, "time", near["time"].cast(pa.int64()))
    for exact in (True, False):
        assert np.unique(row_keys(near, ["time"], exact=exact)).size == 2
    assert (row_keys(near, ["time"], exact=False) == row_keys(ids, ["time"], exact=False)).all()
    nulls = pa.array(rows["reward"].to_numpy(), mask=rows["reward"].to_numpy() == 0.0)
    filled = rows.set_column(4, "reward", nulls)
    assert (keys_of(filled) == keys).all()
    changes: dict[str, pa.Array] = {
        "pscore": pa.array(np.full(50, 0.3)),
        "action": pa.array(np.full(50, 11)),
        "tags": pa.array([["b", "a"]] * 50),
        "x": pa.array([[1.0, 2.0]] * 50),
    }
    for name, values in changes.items():
        changed = rows.set_column(rows.column_names.index(name), name, values)
        assert (keys_of(changed) != keys).all(), name


@pytest.mark.parametrize(("rows", "copied"), [(400, 0.1), (20_000, 0.02), (20_000, 0.6)])
def test_the_share_of_copied_rows_within_its_error(rows: int, copied: float) -> None:
    train, test = table(rows, 1), table(rows, 2)
    count = round(copied * rows)
    order = np.random.default_rng(3).permutation(rows)
    mixed = pa.concat_tables([train.slice(100, count), test.slice(0, rows - count)]).take(order)
    kept = sketch(train)
    stored = RowSketch.from_dict(kept.to_dict())
    assert stored is not None
    found = sketch(mixed.slice(0, 150), mixed.slice(150)).shared(stored)
    assert found is not None and kept.key.size == min(rows, SIZE)
    assert abs(found.share - copied) < 4.0 * found.std_error < 0.3
    assert sketch(test).shared(kept) is None
    whole = sketch(train).shared(kept)
    assert whole is not None and whole.text == "its rows"


@pytest.mark.parametrize("levels", [10, 3000, 30_000])
def test_equal_rows_of_independent_logs_are_chance(levels: int) -> None:
    for seed in range(20):
        train, test = table(6000, 2 * seed, levels), table(3000, 2 * seed + 1, levels)
        assert sketch(test).shared(sketch(train)) is None
    if levels == 30_000:
        found = sketch(train.slice(0, 3000)).shared(sketch(train))
        assert found is not None and abs(found.share - 1.0) < 4.0 * found.std_error
