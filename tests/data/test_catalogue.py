from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


def test_lookup_of_many_ids_equals_a_dictionary() -> None:
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


def in_parts(folder: Path, table: pa.Table, cuts: list[int], rows_per_group: int) -> Path:
    folder.mkdir()
    for number, (start, stop) in enumerate(pairwise([0, *cuts, table.num_rows])):
        part = table.slice(start, stop - start)
        pq.write_table(part, folder / f"{number}.parquet", row_group_size=rows_per_group)
    return folder


def test_content_does_not_depend_on_files_and_row_groups(tmp_path: Path) -> None:
    """Every slice, the fingerprint and the index are those of the whole table in memory."""
    n = 200
    table = pa.table(
        {
            "item_id": [f"item-{i * 7 % 1000}" for i in range(n)],
            "x": np.arange(n) * 0.5,
            "v": [[float(i), -1.0] for i in range(n)],
            "tags": [["a"] * (i % 3) for i in range(n)],
        }
    )
    kinds: list[Any] = [("x", "numeric"), ("v", "vector"), ("tags", "bag")]
    schema = CatalogueSchema(features=tuple(FeatureSpec(name=n, kind=k) for n, k in kinds))
    whole = Catalogue(table, schema)
    opened = [
        Catalogue.open(in_parts(tmp_path / "one", table, [], 1000), schema),
        Catalogue.open(in_parts(tmp_path / "many", table, [1, 50, 51, 180], 17), schema),
    ]
    for catalogue in opened:
        assert catalogue.fingerprint == opened[0].fingerprint
        assert catalogue.num_items == n
        for start, stop in [(0, n), (0, 1), (49, 52), (10, 190), (199, 200), (60, 60), (5, 9)]:
            assert catalogue.table(start, stop).equals(whole.table(start, stop))
        assert catalogue.index_of(table.column("item_id")).tolist() == list(range(n))


def test_bad_items_of_files_are_counted_over_all_row_groups(tmp_path: Path) -> None:
    x = np.arange(100.0)
    x[[40, 77, 99]] = np.nan
    path = in_parts(tmp_path / "c", pa.table({"item_id": np.arange(100), "x": x}), [30], 10)
    schema = CatalogueSchema(features=(FeatureSpec(name="x", kind="numeric"),))
    with pytest.raises(DataError, match=r"item 40 has nan.*3 items in all"):
        Catalogue.open(path, schema)
    pq.write_table(pa.table({"item_id": ["a"], "x": [1.0]}), path / "9.parquet")
    with pytest.raises(DataError, match=r"'item_id' is string in '9.parquet' and int64"):
        Catalogue.open(path, schema)


def test_vectors_of_two_lengths_in_two_parts(tmp_path: Path, monkeypatch: Any) -> None:
    """The first slice says which length is right where the schema does not."""
    import offtower.data.catalogue_rows as rows

    monkeypatch.setattr(rows.CatalogueRows.slices, "__defaults__", (10,))
    table = pa.table({"item_id": np.arange(30), "v": [[1.0, 2.0]] * 25 + [[1.0, 2.0, 3.0]] * 5})
    schema = CatalogueSchema(features=(FeatureSpec(name="v", kind="vector"),))
    with pytest.raises(DataError, match=r"item 25 has \[1.0, 2.0, 3.0\].*5 items in all"):
        Catalogue(table, schema)


def test_opening_reads_features_in_bounded_memory(tmp_path: Path) -> None:
    """400,000 items of 64 floats are 102 MB; a row group of them is 17 MB."""
    n = 400_000
    flat = pa.array(np.zeros(n * 64, dtype=np.float32))
    table = pa.table({"item_id": np.arange(n), "v": pa.FixedSizeListArray.from_arrays(flat, 64)})
    in_parts(tmp_path / "c", table, [], 65_536)
    code = f"""
import resource
from offtower.data import Catalogue, CatalogueSchema, FeatureSpec
schema = CatalogueSchema(features=(FeatureSpec(name="v", kind="vector", dim=64),))
import offtower.data.rules, pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
catalogue = Catalogue.open({str(tmp_path / "c")!r}, schema)
assert catalogue.table(300_000, 300_010).num_rows == 10
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Three row groups' worth while one is checked (float64 among them), and the ids.
    assert int(done.stdout) / 1024 < 180
