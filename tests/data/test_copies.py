"""Catalogues of a store: copied once to a machine, bounded, removed only when nobody reads them."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtower.data import (
    Catalogue,
    CatalogueSchema,
    FeatureSpec,
    copies,
    node_cache,
    write_catalogue,
)
from offtower.data.location import Location
from offtower.errors import DataError
from offtower.retrieval.catalogue_stream import CatalogueStream
from tests.stores import Unruly, failing_reads, in_memory, unruly

SCHEMA = CatalogueSchema(features=(FeatureSpec(name="price", kind="numeric"),))


def table(n: int, first: float = 0.0) -> pa.Table:
    return pa.table({"item_id": list(range(n)), "price": [first + i for i in range(n)]})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(node_cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/data"))


def test_the_same_catalogue_and_one_copy(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, root = unruly(monkeypatch, tmp_path / "store")
    monkeypatch.setattr(copies, "_RANGE", 100)  # Many pieces.
    here = write_catalogue(tmp_path / "here", table(500), SCHEMA)
    there = write_catalogue(f"{root}/items", table(500), SCHEMA)
    assert there.fingerprint == here.fingerprint
    name = "part-00000.parquet"
    whole = (tmp_path / "here" / name).read_bytes()
    assert (tmp_path / "store" / "items" / name).read_bytes() == whole
    handler.opened.clear()
    handler.before = failing_reads(monkeypatch, 3, "reset by peer")
    far = Catalogue.open(f"{root}/items")
    assert far.fingerprint == here.fingerprint
    assert far.table(0, 500).equals(Catalogue.open(tmp_path / "here").table(0, 500))
    assert [(entry / "data").read_bytes() for entry in entries(cache)] == [whole]
    handler.opened.clear()
    handler.before = lambda path: None
    again = Catalogue.open(f"{root}/items")
    sent = pickle.loads(pickle.dumps(again))
    assert sent.table(3, 5).equals(far.table(3, 5))
    assert handler.opened == {"items/_offtower.json": 1}


def test_changed_content_gets_a_new_copy(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = in_memory(monkeypatch)
    write_catalogue(f"{root}/items", table(10), SCHEMA)
    first = Catalogue.open(f"{root}/items")
    Location.of(f"{root}/items").remove()
    write_catalogue(f"{root}/items", table(10, first=7.0), SCHEMA)
    second = Catalogue.open(f"{root}/items")
    assert first.table(0, 1)["price"][0].as_py() == 0.0
    assert second.table(0, 1)["price"][0].as_py() == 7.0
    assert len(entries(cache)) == 2


def test_the_least_recently_used_copy_that_is_closed_is_evicted(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = in_memory(monkeypatch)
    for name in "abc":
        write_catalogue(f"{root}/{name}", table(2000), SCHEMA)
    size = Location.of(f"{root}/a/part-00000.parquet").files()[0].size
    monkeypatch.setenv(node_cache.GIB, str(2.5 * size / 2**30))
    opened = Catalogue.open(f"{root}/a")
    Catalogue.open(f"{root}/b")
    third = Catalogue.open(f"{root}/c")
    kept = "".join((entry / "origin.json").read_text() for entry in entries(cache))
    assert "/a/part" in kept and "/c/part" in kept and "/b/part" not in kept
    with pytest.raises(DataError, match=r"no room for copies of .*OFFTOWER_CACHE_GIB.* in use"):
        Catalogue.open(f"{root}/b")
    assert opened.table(0, 1).num_rows == third.table(0, 1).num_rows == 1


def test_a_full_disk_is_not_filled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = in_memory(monkeypatch)
    write_catalogue(f"{root}/items", table(10), SCHEMA)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**30, 2**30))
    with pytest.raises(DataError, match=r"the disk has 1 GiB free, of which 1 GiB stay free"):
        Catalogue.open(f"{root}/items")
    assert entries(cache) == []
    monkeypatch.setenv(node_cache.GIB, "much")
    with pytest.raises(DataError, match="OFFTOWER_CACHE_GIB='much' must be a number"):
        Catalogue.open(f"{root}/items")


def test_an_unusable_cache_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = in_memory(monkeypatch)
    write_catalogue(f"{root}/items", table(10), SCHEMA)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(node_cache.FOLDER, str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be kept in .*OFFTOWER_CACHE=FOLDER"):
        Catalogue.open(f"{root}/items")


def test_a_file_that_changes_while_it_is_copied(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, root = unruly(monkeypatch, tmp_path / "store")
    write_catalogue(f"{root}/items", table(10), SCHEMA)
    file = tmp_path / "store" / "items" / "part-00000.parquet"

    def grow(path: str) -> None:
        if path.endswith(".parquet"):
            file.write_bytes(file.read_bytes() + b"x")

    handler.before = grow
    with pytest.raises(DataError, match="changed while it was copied"):
        Catalogue.open(f"{root}/items")
    assert entries(cache) == []


_OPEN = """
import sys, pathlib
from pyarrow import fs
from offtower.data import Catalogue, stores
from tests.stores import Unruly
handler = Unruly(pathlib.Path(sys.argv[1]))
handler.seconds = 0.02
stores.mount("test://u", fs.PyFileSystem(handler))
print(Catalogue.open("test://u/items").num_items, handler.opened["items/part-00000.parquet"])
"""


def test_processes_of_a_machine_share_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three that begin together one copies, and the others wait for it."""
    _, root = unruly(monkeypatch, tmp_path / "store")
    write_catalogue(f"{root}/items", table(300), SCHEMA)
    command = [sys.executable, "-c", _OPEN, str(tmp_path / "store")]
    begun = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60)[0].split() for process in begun]
    assert sorted(said) == [["300", "0"], ["300", "0"], ["300", "1"]]


def test_a_stream_is_not_copied(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export reads the store a row group at a time, and has the same chunks."""
    handler, root = unruly(monkeypatch, tmp_path / "store")
    (tmp_path / "store" / "items").mkdir()
    for number, rows in enumerate((250, 90)):
        file = tmp_path / "store" / "items" / f"{number}.parquet"
        pq.write_table(table(rows), file, row_group_size=100)
    handler.before = failing_reads(monkeypatch, 3, "reset by peer")
    near = CatalogueStream(tmp_path / "store" / "items", SCHEMA)
    far = pickle.loads(pickle.dumps(CatalogueStream(f"{root}/items", SCHEMA)))
    for rows, items in ((64, None), (1000, None), (64, range(64, 300))):
        one, two = ([c.table(0, c.num_items) for c in s.chunks(rows, items)] for s in (near, far))
        assert len(one) == len(two) and all(a.equals(b) for a, b in zip(one, two, strict=True))
    assert not cache.exists()
    assert isinstance(handler, Unruly)
