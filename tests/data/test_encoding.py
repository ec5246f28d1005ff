from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offtower.data import FeatureEncoding, FeatureSpec, encoding_fit
from offtower.data.columns import hash_values
from offtower.data.encoding import BagArray, concat, num_rows, take, to_tensors
from offtower.data.lookup import Lookup
from offtower.errors import DataError
from tests.data.conftest import make_schema, make_table


def test_standardization_does_not_depend_on_row_groups() -> None:
    table, specs = make_table(1000), make_schema().context
    whole = FeatureEncoding.fit(specs, [table])
    cut = FeatureEncoding.fit(specs, [table.slice(i, 70) for i in range(0, 1000, 70)])
    arrays = whole.encode(table)
    assert arrays["age"].dtype == np.float32 and arrays["taste"].shape == (1000, 3)
    assert abs(arrays["age"].mean()) < 1e-5 and abs(arrays["age"].std() - 1) < 1e-4
    np.testing.assert_allclose(arrays["taste"].std(axis=0), 1, atol=1e-4)
    np.testing.assert_allclose(arrays["taste"], cut.encode(table)["taste"], atol=1e-5)
    np.testing.assert_array_equal(arrays["country"], cut.encode(table)["country"])


@pytest.mark.parametrize("dictionary", [False, True])
def test_null_and_unseen_categories_are_zero(dictionary: bool) -> None:
    spec = FeatureSpec(name="c", kind="category")
    train = pa.array(["b", "a", None, "b"])
    fitted = FeatureEncoding.fit([spec], [pa.table({"c": train})])
    asked = pa.array(["a", "b", "z", None])
    asked = asked.dictionary_encode() if dictionary else asked
    assert fitted.encode(pa.table({"c": asked}))["c"].tolist() == [1, 2, 0, 0]
    assert fitted.cardinality("c") == 3


def test_integers_booleans_min_count_and_types() -> None:
    spec = FeatureSpec(name="c", kind="category", min_count=2)
    fitted = FeatureEncoding.fit([spec], [pa.table({"c": [5, 7, 7, -2, -2]})])
    assert fitted.encode(pa.table({"c": [7, -2, 5]}))["c"].tolist() == [2, 1, 0]
    with pytest.raises(DataError, match="holds text, but integers"):
        fitted.encode(pa.table({"c": ["shoe"]}))
    flags = FeatureEncoding.fit([spec], [pa.table({"c": [True, True, False, False]})])
    assert flags.encode(pa.table({"c": [False, True]}))["c"].tolist() == [1, 2]


def test_bags_keep_their_lists_and_survive_take_and_concat() -> None:
    spec = FeatureSpec(name="b", kind="bag")
    table = pa.table({"b": [["x", "y"], None, [], ["y", None]]})
    arrays = FeatureEncoding.fit([spec], [table]).encode(table)
    bag = arrays["b"]
    assert isinstance(bag, BagArray)
    assert bag.values.tolist() == [1, 2, 2, 0] and bag.offsets.tolist() == [0, 2, 2, 2, 4]
    picked = concat([take(arrays, np.array([3, 0])), arrays])["b"]
    assert isinstance(picked, BagArray)
    assert picked.values.tolist() == [2, 0, 1, 2, 1, 2, 2, 0] and num_rows({"b": picked}) == 6
    assert to_tensors(arrays)["b"].offsets.tolist() == [0, 2, 2, 2, 4]


def test_round_trips(tmp_path: Path) -> None:
    table = make_table(50)
    fitted = FeatureEncoding.fit(make_schema().context, [table])
    fitted.save(tmp_path)
    for other in (FeatureEncoding.load(tmp_path), FeatureEncoding.from_dict(fitted.to_dict())):
        for name, value in fitted.encode(table).items():
            again = other.encode(table)[name]
            if isinstance(value, BagArray):
                value, again = value.values, again.values
            np.testing.assert_array_equal(value, again)


@pytest.mark.parametrize("kind, most", [(str, 10), (int, 12)])
def test_a_vocabulary_has_a_limit(monkeypatch: pytest.MonkeyPatch, kind: Any, most: int) -> None:
    monkeypatch.setattr(encoding_fit, "MAX_VOCABULARY", 10)
    monkeypatch.setattr(encoding_fit, "MAX_INTEGERS", 12)
    spec = FeatureSpec(name="c", kind="category")
    values = [kind(i) for i in range(most + 1)]
    assert FeatureEncoding.fit([spec], [pa.table({"c": values[1:]})]).cardinality("c") == most + 1
    with pytest.raises(DataError, match=f"more than {most} distinct values; set its encoding to"):
        FeatureEncoding.fit([spec], [pa.table({"c": values})])


def test_hashes_are_stable_and_independent_of_other_rows() -> None:
    words = ["", "a", "abcdefgh", "abcdefghi", "naïve café", "x" * 100]
    code = (
        "import pyarrow as pa; from offtower.data.columns import hash_values;"
        f"print(hash_values(pa.array({words!r})).tolist())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == str(hash_values(pa.array(words)).tolist())
    assert hash_values(pa.array([5], pa.int8())) == hash_values(pa.array([5], pa.int64()))
    assert hash_values(pa.array([0]))[0] == 0xE220A8397B1DCDAF  # splitmix64's published first draw


@settings(max_examples=50)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=20), st.integers(0, 19))
def test_only_equal_texts_have_equal_hashes(words: list[str], start: int) -> None:
    keys = hash_values(pa.array(words))
    assert len(set(keys.tolist())) == len(set(words))
    part = pa.array(words).slice(start % len(words))
    np.testing.assert_array_equal(hash_values(part), keys[start % len(words) :])


def test_hash_buckets() -> None:
    spec = FeatureSpec(name="c", kind="category", encoding="hash", buckets=10)
    fitted = FeatureEncoding.fit([spec], [])
    index = fitted.encode(pa.table({"c": [*map(str, range(200)), None]}))["c"]
    assert index[-1] == 0 and set(index[:-1].tolist()) == set(range(1, 11))
    assert fitted.cardinality("c") == 11


def test_ids_are_held_once() -> None:
    """A vocabulary of the catalogue's rising ids is the ids themselves."""
    ids = pa.array([3, 5, 9])
    specs = [FeatureSpec(name=name, kind="category") for name in ("id", "other")]
    table = pa.table({"id": ids, "other": [1, 1, 2]})
    encoding = FeatureEncoding.fit(specs, [table])
    before = encoding.encode(table)
    lookup = Lookup(ids)
    encoding.share(lookup)
    assert encoding._vocabulary["id"] is ids and encoding._numbers["id"]._lookup is lookup
    assert encoding.cardinality("other") == 3
    for name, value in encoding.encode(table).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("width", [1, 2, 256, 257, 700])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_moments_of_wide_vectors_are_those_of_the_whole_matrix(width: int, kind: type) -> None:
    """Summed by blocks of columns, to the bit."""
    values = (np.random.default_rng(width).normal(5.0, 1e3, (601, width))).astype(kind)
    wide = values.astype(np.float64)
    encoding = FeatureEncoding.fit(
        [FeatureSpec(name="x", kind="vector")],
        [pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)})],
    )
    found = encoding.numbers()
    assert found["mean"]["x"] == wide.mean(axis=0).tolist()
    square = np.square(wide - wide.mean(axis=0)).sum(axis=0)
    assert found["scale"]["x"] == np.sqrt(square / 601).tolist()
