from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from offtower.data.check import check_table
from offtower.data.log import TableOrigin
from offtower.data.obd import _bundled_folder, import_open_bandit
from offtower.errors import DataError, MissingExtraError

pytest.importorskip("obp", reason="the sample ships inside obp")

ITEMS = {"men": 34, "women": 46, "all": 80}


@pytest.mark.parametrize("campaign", ["men", "women", "all"])
def test_campaigns(campaign: str) -> None:
    batches, schema, catalogue = import_open_bandit(campaign)
    table = pa.concat_tables(batches)
    assert table.num_rows == 20_000
    assert catalogue.num_items == ITEMS[campaign]
    assert catalogue.item_ids.to_pylist() == list(range(ITEMS[campaign]))
    assert set(schema.columns) <= set(table.column_names)
    assert set(table["position"].to_pylist()) == {1, 2, 3}
    assert (np.diff(table["timestamp"].cast(pa.int64()).to_numpy()) >= 0).all()
    policy = np.array(table["behavior_policy"].to_pylist())
    assert (policy == "random").sum() == (policy == "bts").sum() == 10_000
    pscore = table["pscore"].to_numpy()
    np.testing.assert_allclose(pscore[policy == "random"], 1 / ITEMS[campaign], rtol=1e-12)
    assert schema.context[-1].dim == ITEMS[campaign]


def test_the_sample_passes_the_row_check() -> None:
    batches, schema, catalogue = import_open_bandit("men")
    table = pa.concat_tables(batches)
    assert check_table(table, schema, catalogue, TableOrigin("sample"), 0) == []


def test_one_policy() -> None:
    batches, _, _ = import_open_bandit("men", ["bts"])
    table = pa.concat_tables(batches)
    assert table.num_rows == 10_000
    assert set(table["behavior_policy"].to_pylist()) == {"bts"}
    assert 38 <= table["reward"].to_numpy().sum() <= 69


def test_hashes_of_users_agree_and_those_of_items_split_alike() -> None:
    """What the module's documentation says of the files."""
    tables = [pa.concat_tables(import_open_bandit("men", [p])[0]) for p in ("random", "bts")]
    for name in ("user_feature_0", "user_feature_1", "user_feature_2"):
        assert set(tables[0][name].to_pylist()) == set(tables[1][name].to_pylist())
    items = [import_open_bandit("men", [p])[2].table(0, 34) for p in ("random", "bts")]
    assert items[0]["item_feature_0"] == items[1]["item_feature_0"]
    for name in ("item_feature_1", "item_feature_2", "item_feature_3"):
        first, second = items[0][name].to_pylist(), items[1][name].to_pylist()
        assert not set(first) & set(second)
        assert len(set(first)) == len(set(zip(first, second, strict=True))) == len(set(second))


def test_a_folder_with_the_same_layout(tmp_path: Path) -> None:
    for policy in ("random", "bts"):
        target = tmp_path / policy / "men"
        target.mkdir(parents=True)
        for name in ("men.csv", "item_context.csv"):
            text = (_bundled_folder() / policy / "men" / name).read_text().splitlines()
            (target / name).write_text("\n".join(text[:101]) + "\n")
    batches, _, catalogue = import_open_bandit("men", source=tmp_path)
    assert pa.concat_tables(batches).num_rows == 200
    assert catalogue.num_items == 34


def test_invalid_folders_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="campaign must be one of"):
        import_open_bandit("children")
    with pytest.raises(DataError, match="behavior_policies"):
        import_open_bandit("men", ["best"])
    with pytest.raises(DataError, match="behavior_policies"):
        import_open_bandit("men", [])
    with pytest.raises(DataError, match="no file"):
        import_open_bandit("men", source=tmp_path)
    folder = tmp_path / "random" / "men"
    folder.mkdir(parents=True)
    (folder / "item_context.csv").write_text("item_id,color\n0,red\n")
    with pytest.raises(DataError, match="not a file of the Open Bandit Dataset"):
        import_open_bandit("men", source=tmp_path)


def test_without_obp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "offtower\[obp\]"'):
        import_open_bandit("men")
