"""Encodings: from columns to arrays and back from disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offtower.data import FeatureEncoding, FeatureSpec, TableLog
from offtower.data.encoding import BagArray, concat, num_rows, take
from offtower.data.schema import LogSchema
from offtower.errors import DataError, RunError

SPECS = (
    FeatureSpec(name="n", kind="numeric"),
    FeatureSpec(name="v", kind="vector"),
    FeatureSpec(name="c", kind="category"),
    FeatureSpec(name="h", kind="category", encoding="hash", buckets=1000, column="c"),
    FeatureSpec(name="b", kind="bag", min_count=2),
)


def table() -> pa.Table:
    return pa.table(
        {
            "n": [1.0, 3.0, 5.0, 7.0],
            "v": pa.FixedSizeListArray.from_arrays(pa.array([0.0, 5.0] * 4), 2),
            "c": ["x", "y", None, "x"],
            "b": [[10, 20], None, [], [10, 30, 10]],
        }
    )


def test_values_are_as_the_docstring_says() -> None:
    encoding = FeatureEncoding.fit(SPECS, [table()])
    arrays = encoding.encode(table())
    np.testing.assert_allclose(arrays["n"], (np.array([1, 3, 5, 7]) - 4) / np.sqrt(5), rtol=1e-6)
    np.testing.assert_array_equal(arrays["v"], np.zeros((4, 2)))  # Constant: centred, not scaled.
    np.testing.assert_array_equal(arrays["c"], [1, 2, 0, 1])
    bag = arrays["b"]
    assert isinstance(bag, BagArray)
    # Only 10 was seen twice; 20 and 30 share the unknown row.
    np.testing.assert_array_equal(bag.values, [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(bag.offsets, [0, 2, 2, 2, 5])
    hashed = arrays["h"]
    assert isinstance(hashed, np.ndarray)
    assert hashed[0] == hashed[3] != hashed[1]
    assert hashed[2] == 0
    assert encoding.cardinality("c") == 3
    assert encoding.cardinality("h") == 1001


def test_unseen_values_are_unknown() -> None:
    encoding = FeatureEncoding.fit(SPECS, [table()])
    new = table().set_column(2, "c", pa.array(["z", "x", "y", "w"]))
    np.testing.assert_array_equal(encoding.encode(new)["c"], [0, 1, 2, 0])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_cuts_of_the_rows_do_not_matter(sizes: list[int]) -> None:
    whole = FeatureEncoding.fit(SPECS, [table()])
    cuts, start = [], 0
    for size in [*sizes, 4]:
        cuts.append(table().slice(start, size))
        start += size
    parts = FeatureEncoding.fit(SPECS, [c for c in cuts if c.num_rows])
    for name, value in whole.encode(table()).items():
        other = parts.encode(table())[name]
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(other, value, atol=1e-6)


def test_take_and_concat_are_inverse() -> None:
    arrays = FeatureEncoding.fit(SPECS, [table()]).encode(table())
    both = concat([take(arrays, np.array([2, 3])), take(arrays, np.array([0, 1]))])
    back = take(both, np.array([2, 3, 0, 1]))
    assert num_rows(back) == 4
    for name, value in arrays.items():
        other = back[name]
        if isinstance(value, BagArray):
            assert isinstance(other, BagArray)
            np.testing.assert_array_equal(other.values, value.values)
            np.testing.assert_array_equal(other.offsets, value.offsets)
        else:
            np.testing.assert_array_equal(other, value)


def test_round_trip_on_disk(tmp_path: Path) -> None:
    encoding = FeatureEncoding.fit(SPECS, [table()])
    encoding.save(tmp_path)
    loaded = FeatureEncoding.load(tmp_path)
    assert loaded.specs == encoding.specs
    for name, value in encoding.encode(table()).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(loaded.encode(table())[name], value)
    (tmp_path / "encoding.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        FeatureEncoding.load(tmp_path)


def test_hash_is_the_same_in_another_process() -> None:
    code = (
        "import pyarrow as pa; from offtower.data.columns import hash_values as h;"
        "print([int(x) for x in h(pa.array(['a','ü','']))], [int(x) for x in h(pa.array([0,-1,7]))])"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1
    # Frozen: a model in the field must find its buckets again.
    assert "16294208416658607535" in runs.pop()


def test_large_offsets_keep_small_differences() -> None:
    stamps = pa.table({"n": np.array([1.7e9, 1.7e9 + 1, 1.7e9 + 2])})
    encoding = FeatureEncoding.fit(SPECS[:1], [stamps])
    values = encoding.encode(stamps)["n"]
    assert isinstance(values, np.ndarray)
    np.testing.assert_allclose(np.diff(values), np.sqrt(1.5), rtol=1e-4)


def test_mixed_text_and_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="text in one file and numbers in another"):
        FeatureEncoding.fit(SPECS[2:3], [pa.table({"c": ["a"]}), pa.table({"c": [1]})])


def test_table_log_groups() -> None:
    schema = LogSchema(action="c", reward="n", pscore=None)
    log = TableLog(table(), schema, rows_per_group=3)
    assert log.row_group_sizes.tolist() == [3, 1]
    assert log.read_row_group(1).num_rows == 1
