"""Item features on disk give what they give in memory."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.data import (
    Catalogue,
    CatalogueSchema,
    FeatureEncoding,
    FeatureSpec,
    node_cache,
    write_catalogue,
)
from offtower.data.encoding import BagTensor
from offtower.models import ItemFeatures

N = 53


def catalogue(bags: list[Any] | None = None) -> tuple[Catalogue, FeatureEncoding]:
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "item_id": np.arange(N),
            "x": rng.normal(size=N),
            "v": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=3 * N)), 3),
            "c": rng.integers(0, 5, N),
            "b": pa.array(bags or [list(range(i % 4)) for i in range(N)], pa.list_(pa.int64())),
        }
    )
    kinds: list[Any] = [("x", "numeric"), ("v", "vector"), ("c", "category"), ("b", "bag")]
    specs = tuple(FeatureSpec(name=name, kind=kind) for name, kind in kinds)
    opened = Catalogue.from_table(table, CatalogueSchema(features=specs))
    return opened, FeatureEncoding.fit(specs, [table])


def same(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        other = two[name]
        if isinstance(value, BagTensor):
            assert torch.equal(value.values, other.values)
            assert torch.equal(value.offsets, other.offsets)
        else:
            assert torch.equal(value, other)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(node_cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/features.json"))


@pytest.mark.parametrize("bags", [None, [[]] * N])
@pytest.mark.parametrize("room", [True, False])
def test_mapped_features_are_those_in_memory(
    cache: Path, monkeypatch: pytest.MonkeyPatch, bags: list[Any] | None, room: bool
) -> None:
    items, encoding = catalogue(bags)
    memory = ItemFeatures.from_catalogue(items, encoding, chunk=10)
    monkeypatch.setenv(node_cache.GIB, "1" if room else "0")
    mapped = ItemFeatures.from_catalogue(items, encoding, 10, share_above=0)
    assert len(entries(cache)) == int(room)
    dense = mapped.arrays["v"]
    assert isinstance(dense, np.ndarray) and not dense.flags.writeable
    for start, stop in [(0, N), (0, 1), (17, 42), (N - 1, N)]:
        same(mapped.slice(start, stop), memory.slice(start, stop))
        same(mapped.part(start, stop).slice(0, stop - start), memory.slice(start, stop))
    index = torch.tensor([5, 5, 0, N - 1, 11])
    same(mapped.at(index), memory.at(index))
    # What is handed out may be written to.
    value = mapped.at(index)["v"]
    assert isinstance(value, torch.Tensor)
    value.zero_()


def test_features_on_disk_are_used_again_for_the_same_catalogue_and_encoding(
    cache: Path,
) -> None:
    items, encoding = catalogue()
    first = ItemFeatures.from_catalogue(items, encoding, 10, share_above=0)
    (written,) = entries(cache)
    loaded = FeatureEncoding.from_dict(encoding.to_dict())
    again = ItemFeatures.from_catalogue(items, loaded, 10, share_above=0)
    same(again.slice(0, N), first.slice(0, N))
    assert entries(cache) == [written]
    other, _ = catalogue([[1]] * N)
    changed = ItemFeatures.from_catalogue(other, encoding, 10, share_above=0)
    bag = changed.slice(0, N)["b"]
    assert isinstance(bag, BagTensor) and len(bag.values) == N
    recoded = FeatureEncoding.fit(encoding.specs, [items.table(0, N - 1)])
    ItemFeatures.from_catalogue(items, recoded, 10, share_above=0)
    assert len(entries(cache)) == 3


@pytest.mark.parametrize("where", ["memory", "files", "another machine"])
def test_features_are_sent_to_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Those of a catalogue in files are opened, or encoded, where they arrive."""
    items, encoding = catalogue()
    if where != "memory":
        items = write_catalogue(tmp_path / "items", items.table(0, N), items.schema)
        items = Catalogue.open(tmp_path / "items")
    features = ItemFeatures.from_catalogue(items, encoding, 10, share_above=0)
    sent = pickle.dumps(features)
    if where == "another machine":
        monkeypatch.setenv(node_cache.FOLDER, str(tmp_path / "there"))
    for one in (pickle.loads(sent), pickle.loads(pickle.dumps(pickle.loads(sent)))):
        same(one.slice(0, N), features.slice(0, N))
    same(pickle.loads(pickle.dumps(features.part(3, 9))).slice(0, 6), features.slice(3, 9))


def test_damaged_features_are_written_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    items, encoding = catalogue()
    first = ItemFeatures.from_catalogue(items, encoding, 10, share_above=0)
    (written,) = entries(cache)
    (written / "1.npy").unlink()
    (written / "1.npy").write_bytes(b"broken")
    again = ItemFeatures.from_catalogue(items, encoding, 10, share_above=0)
    assert "1.npy' is truncated" in caplog.text
    same(again.slice(0, N), first.slice(0, N))
