from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from offtower.data import Catalogue, CatalogueSchema, FeatureSpec, write_catalogue
from offtower.errors import DataError

IDS: list[Any] = [
    ["b", "a", "", "long " * 20],
    [10, 11, 12, 9],
    [-5, 2**62, 0, 7],
    pa.array([2**63 + 1, 1, 2**64 - 1, 0], pa.uint64()),
]


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("dictionary", [False, True])
def test_ids_are_found(ids: Any, dictionary: bool) -> None:
    ids = pa.array(ids)
    catalogue = Catalogue.from_arrays(ids, {"x": np.arange(4.0)})
    asked = pa.concat_arrays([ids.take(pa.array([3, 1, 0, 1, 2])), pa.nulls(1, ids.type)])
    asked = asked.dictionary_encode() if dictionary else asked
    assert catalogue.index_of(asked).tolist() == [3, 1, 0, 1, 2, -1]
    assert catalogue.index_of(pa.chunked_array([asked, asked])).tolist()[6:] == [3, 1, 0, 1, 2, -1]
    assert catalogue.item_ids.to_pylist() == ids.to_pylist()


def test_unknown_ids_and_ids_of_another_type() -> None:
    text = Catalogue.from_arrays(["a", "5"], {})
    assert text.index_of(pa.array(["c", "5", None])).tolist() == [-1, 1, -1]
    assert text.index_of(pa.array([5])).tolist() == [-1]
    whole = Catalogue.from_arrays([4, 5], {})
    assert whole.index_of(pa.array([3, 6, -(2**63), 2**63 - 1, 5])).tolist() == [-1, -1, -1, -1, 1]
    assert whole.index_of(pa.array([], pa.int64())).tolist() == []


def test_against_a_dictionary_of_many() -> None:
    ids = np.random.default_rng(0).permutation(100_000)[:50_000]
    catalogue = Catalogue.from_arrays([f"item-{i}" for i in ids], {})
    place = {int(item): number for number, item in enumerate(ids)}
    found = catalogue.index_of(pa.array([f"item-{i}" for i in range(100_000)]))
    assert found.tolist() == [place.get(i, -1) for i in range(100_000)]


@pytest.mark.parametrize(
    ("ids", "feature", "kind", "message"),
    [
        (["a", "b", "a"], [1.0] * 3, "numeric", "id 'a' stands twice .* as items 0 and 2"),
        (["a", None, "c"], [1.0] * 3, "numeric", "item 1 of the catalogue has a null id"),
        ([1.5, 2.5, 3.5], [1.0] * 3, "numeric", "text or integers, but column 'item_id' is double"),
        ([1, 2, 3], [1.0, float("nan"), None], "numeric", "item 1 has nan.*2 items in all"),
        ([1, 2, 3], ["x"] * 3, "numeric", "must be a number, but is string"),
        ([1, 2, 3], [[1.0], None, [1.0]], "vector", "item 1 has None, expected finite numbers"),
        ([1, 2, 3], [[1.0], [1.0, 2.0], [1.0]], "vector", r"item 1 has \[1.0, 2.0\]"),
        ([1, 2, 3], [1.5] * 3, "category", "must be text or an integer, but is double"),
        ([1, 2, 3], ["x"] * 3, "bag", "must be a list of text or integers, but is string"),
    ],
)
def test_malformed_catalogues(ids: Any, feature: Any, kind: Any, message: str) -> None:
    schema = CatalogueSchema(features=(FeatureSpec(name="f", kind=kind),))
    with pytest.raises(DataError, match=message):
        Catalogue(pa.table({"item_id": ids, "f": feature}), schema)


def test_written_and_read_again(tmp_path: Path) -> None:
    schema = CatalogueSchema(item_id="sku", features=(FeatureSpec(name="f", kind="bag"),))
    table = pa.table({"sku": ["a", "b", "c"], "f": [["x"], [], None]})
    written = write_catalogue(tmp_path / "c", table, schema)
    again = Catalogue.open(tmp_path / "c")
    assert again.schema == schema and again.fingerprint == written.fingerprint
    assert again.num_items == 3 and again.table(1, 3).column("sku").to_pylist() == ["b", "c"]
    with pytest.raises(DataError, match="has no column 'item_id'"):
        Catalogue.open(tmp_path / "c", CatalogueSchema())
    with pytest.raises(DataError, match="no items"):
        Catalogue(table.slice(0, 0), schema)
