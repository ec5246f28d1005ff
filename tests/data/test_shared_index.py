"""The index of a large catalogue: in files that one process of a machine builds and all map."""

from __future__ import annotations

import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offtower.data import (
    Catalogue,
    CatalogueSchema,
    FeatureSpec,
    catalogue_index,
    node_cache,
    write_catalogue,
)
from offtower.data.mapped_lookup import open_vocabulary
from offtower.errors import DataError
from tests.stores import in_memory

SCHEMA = CatalogueSchema(features=(FeatureSpec(name="price", kind="numeric"),))
TEXT = st.text(max_size=6)
INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 40)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(node_cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue_index, "SHARE_ABOVE", 0)
    return tmp_path / "cache"


def table(ids: Any, first: float = 0.0) -> pa.Table:
    return pa.table({"item_id": ids, "price": np.arange(len(ids)) + first})


def entries(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/catalogue.json"))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("kind, type_", [(TEXT, pa.string()), (INTEGERS, pa.int64())])
def test_ids_are_found_as_in_a_dictionary(tmp_path: Path, kind: Any, type_: Any, data: Any) -> None:
    ids = data.draw(st.lists(kind, unique=True, min_size=1, max_size=20))
    asked = data.draw(st.lists(st.none() | kind | st.sampled_from(ids), max_size=20))
    number = {item: i for i, item in enumerate(ids)}
    expected = [-1 if one is None else number.get(one, -1) for one in asked]
    file = tmp_path / "items.parquet"
    pq.write_table(table(pa.array(ids, type_)), file)
    opened = Catalogue.open(file, SCHEMA)
    assert isinstance(opened._index, catalogue_index.SharedIndex)
    for one in (opened, pickle.loads(pickle.dumps(opened.index_only()))):
        assert one.index_of(pa.array(asked, type_)).tolist() == expected
        assert one.index_of(pa.array(ids, type_)).tolist() == list(range(len(ids)))
        assert one.item_ids.to_pylist() == ids
    assert opened.fingerprint == Catalogue(pq.read_table(file), SCHEMA).fingerprint


def test_bad_catalogues_are_refused_and_leave_nothing(tmp_path: Path, cache: Path) -> None:
    for ids, message in ((["a", "b", "a"], "'a' stands twice"), (["a", None], "null id")):
        pq.write_table(table(pa.array(ids)), tmp_path / "items.parquet")
        with pytest.raises(DataError, match=message):
            Catalogue.open(tmp_path / "items.parquet", SCHEMA)
    assert entries(cache) == [] and not list(cache.glob(".*.partial"))


def test_an_index_is_built_once_for_equal_files(tmp_path: Path, cache: Path) -> None:
    """Files that a manifest lists are known by their sha256, wherever they are."""
    ids = [f"item-{i}" for i in range(100)]
    for name in ("one", "two"):
        write_catalogue(tmp_path / name, table(ids), SCHEMA)
        Catalogue.open(tmp_path / name)
    assert len(entries(cache)) == 1
    write_catalogue(tmp_path / "three", table(ids, first=1.0), SCHEMA)
    third = Catalogue.open(tmp_path / "three")
    assert len(entries(cache)) == 2
    assert third.table(0, 1)["price"][0].as_py() == 1.0


def test_the_index_is_sent_as_a_place(tmp_path: Path) -> None:
    write_catalogue(tmp_path / "items", table([f"item-{i}" for i in range(20_000)]), SCHEMA)
    sent = pickle.dumps(Catalogue.open(tmp_path / "items").index_only())
    assert len(sent) < 20_000


def test_an_index_sent_to_another_machine_is_built_from_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies and the index are both entries, whose writers exclude each other."""
    root = in_memory(monkeypatch)
    write_catalogue(f"{root}/items", table(["a", "b", "c"]), SCHEMA)
    sent = pickle.dumps(Catalogue.open(f"{root}/items").index_only())
    monkeypatch.setenv(node_cache.FOLDER, str(tmp_path / "other"))
    assert pickle.loads(sent).index_of(pa.array(["c"])).tolist() == [2]
    assert len(entries(tmp_path / "other")) == 1


@pytest.mark.parametrize("name", ["values.arrow", "keys.npy", "order.npy", "catalogue.json"])
def test_a_damaged_file_is_built_again(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    ids = [f"item-{i * 7 % 300}" for i in range(300)]
    write_catalogue(tmp_path / "items", table(ids), SCHEMA)
    Catalogue.open(tmp_path / "items")
    (entry,) = entries(cache)
    content = bytearray((entry / name).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / name).write_bytes(content)
    again = Catalogue.open(tmp_path / "items")
    assert "corrupted" in caplog.text and name in caplog.text
    assert again.index_of(pa.array(ids)).tolist() == list(range(300))
    assert len(entries(cache)) == 1


def test_silent_damage_is_found_after_the_machine_starts(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_catalogue(tmp_path / "items", table(["a", "b"]), SCHEMA)
    Catalogue.open(tmp_path / "items")
    file = entries(cache)[0] / "order.npy"
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    noted = file.parent / "verified.json"
    facts = json.loads(noted.read_text())
    noted.write_text(json.dumps(["another boot", *facts[1:]]))
    again = Catalogue.open(tmp_path / "items")
    assert "corrupted" in caplog.text
    assert again.index_of(pa.array(["b", "a"])).tolist() == [1, 0]


def test_without_room_each_process_has_its_own(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_catalogue(tmp_path / "items", table(["a", "b"]), SCHEMA)
    monkeypatch.setenv(node_cache.GIB, "0")
    opened = Catalogue.open(tmp_path / "items")
    assert not isinstance(opened._index, catalogue_index.SharedIndex)
    assert opened.index_of(pa.array(["b", "c"])).tolist() == [1, -1]
    assert "not shared" in caplog.text and "OFFTOWER_CACHE_GIB" in caplog.text


def begin(items: Path, said: Path, *, dies: bool = False) -> int:
    """Open the catalogue in a new process, which appends to `said` what it does."""
    process = os.fork()
    if process:
        return process
    try:
        write = catalogue_index.write_lookup

        def counted(folder: Path, lookup: Any) -> None:
            write(folder, lookup)
            with open(said, "a") as file:
                file.write("built ")
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

        catalogue_index.write_lookup = counted
        found = Catalogue.open(items).index_of(pa.array(["item-7", "x"]))
        with open(said, "a") as file:
            file.write(f"{found.tolist()} ")
    finally:
        os._exit(0)


def test_one_process_builds_and_another_replaces_a_killed_builder(
    tmp_path: Path, cache: Path
) -> None:
    write_catalogue(tmp_path / "items", table([f"item-{i}" for i in range(50)]), SCHEMA)
    said = tmp_path / "said"
    killed = os.waitpid(begin(tmp_path / "items", said, dies=True), 0)[1]
    assert os.WTERMSIG(killed) == signal.SIGKILL and said.read_text() == "built "
    assert len(list(cache.glob(".*.partial"))) == 1 and entries(cache) == []
    said.unlink()
    for process in [begin(tmp_path / "items", said) for _ in range(3)]:
        assert os.waitpid(process, 0)[1] == 0
    assert sorted(said.read_text().split(" ")) == ["", *["-1]"] * 3, *["[7,"] * 3, "built"]
    assert not list(cache.glob(".*.partial")) and len(entries(cache)) == 1


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("kind, type_", [(TEXT, pa.string()), (INTEGERS, pa.int64())])
def test_vocabularies_are_shared(tmp_path: Path, kind: Any, type_: Any, data: Any) -> None:
    values = sorted(data.draw(st.lists(kind, unique=True, min_size=1, max_size=20)))
    asked = data.draw(st.lists(st.none() | kind | st.sampled_from(values), max_size=20))
    pq.write_table(pa.table({"value": pa.array(values, type_)}), tmp_path / "v.parquet")
    own, shared = (open_vocabulary(tmp_path / "v.parquet", above) for above in (1 << 30, 0))
    assert shared.values.equals(own.values)
    number = {value: i for i, value in enumerate(values)}
    expected = [-1 if one is None else number.get(one, -1) for one in asked]
    assert own.find(pa.array(asked, type_)).tolist() == expected
    assert shared.find(pa.array(asked, type_)).tolist() == expected
