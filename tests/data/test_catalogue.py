"""Catalogues: ids to numbers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offtower.data import Catalogue, CatalogueSchema, FeatureSpec, write_catalogue
from offtower.errors import DataError


@given(
    st.one_of(
        st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=1, max_size=40),
        st.lists(st.text(max_size=8), unique=True, min_size=1, max_size=40),
    ),
    st.randoms(),
)
def test_every_id_is_found_where_it_stands(ids: list[Any], random: Any) -> None:
    catalogue = Catalogue.from_arrays(ids, {"f": np.zeros(len(ids))})
    asked = [random.choice(ids) for _ in range(20)]
    found = catalogue.index_of(pa.array(asked))
    assert [ids[i] for i in found] == asked


@pytest.mark.parametrize("ids", [[1, 2, 3], ["1", "2", "3"]])
def test_unknown_null_and_other_kinds_are_minus_one(ids: list[Any]) -> None:
    catalogue = Catalogue.from_arrays(ids, {"f": np.zeros(3)})
    other = ["1", "9"] if isinstance(ids[0], int) else [1, 9]
    assert catalogue.index_of(pa.array(other)).tolist() == [-1, -1]
    same = pa.array([ids[2], None, ids[0]])
    assert catalogue.index_of(same).tolist() == [2, -1, 0]
    assert catalogue.index_of(same.dictionary_encode()).tolist() == [2, -1, 0]


def schema(**kinds: str) -> CatalogueSchema:
    return CatalogueSchema(features=tuple(FeatureSpec(n, k) for n, k in kinds.items()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "kinds", "message"),
    [
        ({"item_id": [1, 2, 1]}, {}, "item id 1 stands twice in the catalogue, as items 0 and 2"),
        ({"item_id": ["a", None]}, {}, "item 1 of the catalogue has a null id"),
        ({"item_id": [1.5]}, {}, "ids must be text or integers"),
        ({"id": [1]}, {}, "no column 'item_id'"),
        ({"item_id": [1, 2], "p": [1.0, None]}, {"p": "numeric"}, "item 1 has None"),
        ({"item_id": [1, 2], "p": [float("inf"), 0]}, {"p": "numeric"}, "item 0 has inf"),
        ({"item_id": [1, 2], "p": ["a", "b"]}, {"p": "numeric"}, "must be a number"),
        ({"item_id": [1, 2], "v": [[1.0], [1.0, 2.0]]}, {"v": "vector"}, "item 1 has"),
        ({"item_id": [1], "v": [3.0]}, {"v": "vector"}, "must be a list of numbers"),
        ({"item_id": pa.array([], pa.int64())}, {}, "no items"),
    ],
)
def test_bad_catalogues(columns: dict[str, Any], kinds: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Catalogue.from_table(pa.table(columns), schema(**kinds))


def test_round_trip_on_disk(tmp_path: Path) -> None:
    table = pa.table({"item_id": ["x", "y"], "p": [1.0, 2.0]})
    written = write_catalogue(tmp_path / "c", table, schema(p="numeric"))
    opened = Catalogue.open(tmp_path / "c")
    assert opened.schema == written.schema
    assert opened.fingerprint == written.fingerprint
    assert opened.table(0, 2).to_pydict() == table.to_pydict()
    with pytest.raises(DataError, match="exists already"):
        write_catalogue(tmp_path / "c", table, schema(p="numeric"))


def test_fingerprint_sees_every_value() -> None:
    one = Catalogue.from_arrays([1, 2], {"f": np.array([0.0, 1.0])})
    two = Catalogue.from_arrays([1, 2], {"f": np.array([0.0, 1.5])})
    assert one.fingerprint != two.fingerprint
