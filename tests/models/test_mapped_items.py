"""Item features on disk give what they give in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from offtower.data import Catalogue, CatalogueSchema, FeatureEncoding, FeatureSpec
from offtower.data.encoding import BagTensor
from offtower.errors import RunError
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


@pytest.mark.parametrize("bags", [None, [[]] * N])
@pytest.mark.parametrize("named", [True, False])
def test_mapped_features_are_those_in_memory(
    tmp_path: Path, bags: list[Any] | None, named: bool
) -> None:
    items, encoding = catalogue(bags)
    memory = ItemFeatures.from_catalogue(items, encoding, chunk=10)
    folder = tmp_path / "items" if named else None
    mapped = ItemFeatures.from_catalogue(items, encoding, 10, directory=folder, map_above=0)
    assert mapped._mapped and not memory._mapped
    for start, stop in [(0, N), (0, 1), (17, 42), (N - 1, N)]:
        same(mapped.slice(start, stop), memory.slice(start, stop))
    index = torch.tensor([5, 5, 0, N - 1, 11])
    same(mapped.at(index), memory.at(index))
    # What is handed out may be written to.
    value = mapped.at(index)["v"]
    assert isinstance(value, torch.Tensor)
    value.zero_()


def test_features_on_disk_are_used_again_if_they_are_of_this_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, encoding = catalogue()
    folder = tmp_path / "items"
    first = ItemFeatures.from_catalogue(items, encoding, 10, directory=folder, map_above=0)
    monkeypatch.setattr(FeatureEncoding, "encode", None)
    again = ItemFeatures.from_catalogue(items, encoding, 10, directory=folder, map_above=0)
    same(again.slice(0, N), first.slice(0, N))
    monkeypatch.undo()
    other, _ = catalogue([[1]] * N)
    changed = ItemFeatures.from_catalogue(other, encoding, 10, directory=folder, map_above=0)
    bag = changed.slice(0, N)["b"]
    assert isinstance(bag, BagTensor) and len(bag.values) == N


def test_damaged_features_are_named(tmp_path: Path) -> None:
    items, encoding = catalogue()
    folder = tmp_path / "items"
    ItemFeatures.from_catalogue(items, encoding, 10, directory=folder, map_above=0)
    (folder / "1.npy").write_bytes(b"broken")
    with pytest.raises(RunError, match="remove that folder"):
        ItemFeatures.from_catalogue(items, encoding, 10, directory=folder, map_above=0)
