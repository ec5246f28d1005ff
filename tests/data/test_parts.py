"""Logs written by many workers: the bytes that one writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offtower.data.check import BadRowsError
from offtower.data.ingest import IngestSource, ingest_files
from offtower.data.log import ParquetLog, write_log
from offtower.data.parts import RowSource, write_log_parts
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.data.simulate import (
    LoggingPolicy,
    SimulatedWorld,
    WorldSettings,
    write_simulated_log,
)
from offtower.data.split import split_log
from offtower.errors import DataError
from offtower.execution import LOCAL
from tests.data.conftest import make_schema, make_table
from tests.mappers import BACKWARDS, content


class Units(RowSource):
    """A table cut into units of given sizes."""

    def __init__(self, table: pa.Table, sizes: list[int]) -> None:
        self.table, self.counts = table, np.asarray(sizes, dtype=np.int64)

    def tables(self, unit: int) -> Iterator[pa.Table]:
        first, count = int(self.counts[:unit].sum()), int(self.counts[unit])
        for start in range(0, count, 7):
            yield self.table.slice(first + start, min(7, count - start))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
def test_rows_of_units(sizes: list[int], data: st.DataObject) -> None:
    total = sum(sizes)
    first = data.draw(st.integers(0, total))
    last = data.draw(st.integers(first, total))
    source = Units(pa.table({"n": np.arange(total)}), sizes)
    found = [n for table in source.rows(first, last) for n in table["n"].to_pylist()]
    assert found == list(range(first, last))


def test_the_same_bytes_as_one_writer(tmp_path: Path) -> None:
    table, schema = make_table(1000), make_schema()
    write_log(tmp_path / "one", [table], schema, rows_per_group=64, rows_per_file=200)
    source = Units(table, [100, 0, 450, 1, 449])
    write_log_parts(
        tmp_path / "many",
        source,
        schema,
        BACKWARDS,
        rows_per_group=64,
        rows_per_file=200,
    )
    one = content(tmp_path / "one")
    assert len(one) == 7 and content(tmp_path / "many") == one


def test_no_rows_and_a_taken_name_are_refused(tmp_path: Path) -> None:
    empty = Units(make_table(1).slice(0, 0), [0])
    with pytest.raises(DataError, match="no rows"):
        write_log_parts(tmp_path / "log", empty, make_schema(), BACKWARDS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="exists already"):
        write_log_parts(tmp_path, empty, make_schema(), BACKWARDS)


SCHEMA = LogSchema(
    context=(
        FeatureSpec(name="age", kind="numeric"),
        FeatureSpec(name="vector", kind="vector"),
    )
)


def write_source(folder: Path, kind: str, bad: bool, n: int = 3000) -> None:
    """Two files of n rows; with `bad`, every 97th row is, the first rows of all among them."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    for number in range(2):
        reward = rng.random(n)
        if bad:
            reward[:: 97 + number] = np.nan
        columns = {
            "age": pa.array(rng.random(n)),
            "action": pa.array(rng.integers(0, 50, n)),
            "reward": pa.array(reward),
            "pscore": pa.array(rng.uniform(0.01, 1.0, n)),
        }
        if kind == "csv":
            pa.csv.write_csv(pa.table(columns), folder / f"{number}.csv")
            continue
        vectors = rng.random((n, 3)).tolist()
        if bad:
            vectors[5] = [1.0]
        columns["vector"] = pa.array(vectors, pa.list_(pa.float32()))
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=700)


def schema_of(kind: str) -> LogSchema:
    return SCHEMA if kind == "parquet" else LogSchema(context=SCHEMA.context[:1])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("bad", [False, True])
def test_ingestion_by_many_workers(
    tmp_path: Path, kind: str, bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same log, same catalogue, same quarantine, bit by bit."""
    monkeypatch.setattr("offtower.data.source._UNIT_ROWS", 1000)
    write_source(tmp_path / "source", kind, bad)
    found = []
    for name, execution in (("one", LOCAL), ("many", BACKWARDS)):
        summary = ingest_files(
            IngestSource(tmp_path / "source", schema_of(kind)),
            tmp_path / name,
            on_bad_rows="quarantine" if bad else "error",
            execution=execution,
        )
        found.append((summary.rows, summary.items, summary.quarantined))
    assert found[0] == found[1] and (found[0][2] > 0) == bad
    assert content(tmp_path / "many") == content(tmp_path / "one")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_first_bad_row_is_named_alike(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offtower.data.source._UNIT_ROWS", 1000)
    write_source(tmp_path / "source", kind, bad=True)
    texts = []
    for execution in (LOCAL, BACKWARDS):
        with pytest.raises(BadRowsError) as caught:
            source = IngestSource(tmp_path / "source", schema_of(kind))
            ingest_files(source, tmp_path / "out", execution=execution)
        texts.append(str(caught.value))
        assert not list((tmp_path / "out").iterdir())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("by", ["time", "row", "user"])
def test_splitting_by_many_workers(tmp_path: Path, by: str) -> None:
    world = SimulatedWorld(50, seed=3)
    write_log(tmp_path / "log", world.log(5000), world.log_schema, rows_per_group=300)
    one = split_log(tmp_path / "log", tmp_path / "one", by=by)
    many = split_log(tmp_path / "log", tmp_path / "many", by=by, execution=BACKWARDS)
    assert one == many
    assert content(tmp_path / "many") == content(tmp_path / "one")


@pytest.mark.parametrize("several", [False, True])
def test_simulating_by_many_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """Two policies log a full chunk each and, at the end, parts of one."""
    monkeypatch.setattr("offtower.data.simulate.log_files.ROWS_PER_FILE", 65_536)
    world = SimulatedWorld(20, WorldSettings(2, 2, 2, feature_kinds="all"), seed=3)
    policies = {name: LoggingPolicy(beta=b) for name, b in (("low", -1.0), ("high", 1.0))}
    made_by = policies if several else None
    for name, execution in (("one", LOCAL), ("many", BACKWARDS)):
        place = tmp_path / name
        write_simulated_log(world, place, 70_001, 1, policies=made_by, execution=execution)
    log = ParquetLog.open(tmp_path / "many")
    assert log.num_rows == 70_001
    assert len(content(tmp_path / "one")) == 3
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_a_bare_catalogue_numbers_items_as_the_full_one() -> None:
    world = SimulatedWorld(30, WorldSettings(string_ids=True))
    catalogue = world.catalogue()
    bare = catalogue.index_only()
    assert bare.num_items == 30 and bare.text_ids
    ids = pa.chunked_array([["item-7", "item-29", "none", None]])
    assert bare.index_of(ids).tolist() == catalogue.index_of(ids).tolist() == [7, 29, -1, -1]
    assert (
        bare.schema
        == catalogue.schema
        == CatalogueSchema(item_id="item_id", features=catalogue.schema.features)
    )
