"""Rows of older logs beside those of a log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from offtower.data import Catalogue, ParquetLog, write_log
from offtower.data.replay import ReplayLog, replay
from offtower.data.schema import LogSchema
from offtower.errors import DataError
from tests.training.days import ITEMS, ROWS, catalogue, log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of items 4..23, and two older ones of items 0..19, whose ages are unique numbers."""
    place = tmp_path_factory.mktemp("logs")
    for number, items in enumerate((range(4, 24), range(20), range(20))):
        rows = log(1000, items, range(9), seed=number)
        age = pa.array(np.arange(1000.0) + 1000 * number)
        rows = rows.set_column(rows.column_names.index("age"), "age", age)
        write_log(place / str(number), [rows], ROWS, rows_per_group=100)
    return place


def opened(folder: Path, share: float = 0.2, seed: int = 3) -> ReplayLog:
    items = Catalogue(catalogue(range(4, 24)), ITEMS)
    own = ParquetLog.open(folder / "0")
    return replay(own, [str(folder / "1"), str(folder / "2")], items, share, seed)


def test_own_rows_come_first_and_others_have_the_share_and_their_propensities(folder: Path) -> None:
    found = opened(folder)
    assert found.own_groups == 10 and found.replayed == 250 and found.num_rows == 1250
    rows = pa.concat_tables(found.tables())
    assert rows.slice(0, 1000)["age"].to_pylist() == list(range(1000))
    older = pa.concat_tables(table for n in "12" for table in ParquetLog.open(folder / n).tables())
    index = rows.slice(1000)["age"].to_numpy().astype(int) - 1000
    assert len(set(index.tolist())) == 250
    assert rows.slice(1000).to_pylist() == older.take(index).to_pylist()
    assert not any(item < "i04" for item in rows["item"].to_pylist())
    assert found.left_out > 0


def test_the_draw_is_that_of_its_seed_and_part_of_the_fingerprint(folder: Path) -> None:
    one, two, other = opened(folder), opened(folder), opened(folder, seed=4)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.fingerprint != ParquetLog.open(folder / "0").fingerprint
    few = one.read_row_group(11, ["age"]).column("age").to_pylist()
    assert few == two.read_row_group(11, ["age"]).column("age").to_pylist() == sorted(few)


def test_without_older_rows_the_log_is_its_own(folder: Path) -> None:
    own = ParquetLog.open(folder / "0")
    found = ReplayLog(own, {}, Catalogue(catalogue(range(4, 24)), ITEMS), 0.2, 3)
    assert found.replayed == 0 and found.num_rows == own.num_rows == 1000


def test_all_older_rows_are_taken_where_there_are_too_few(folder: Path) -> None:
    found = opened(folder, share=0.9)
    older = [*ParquetLog.open(folder / "1").tables(), *ParquetLog.open(folder / "2").tables()]
    kept = sum(item >= "i04" for table in older for item in table["item"].to_pylist())
    assert found.replayed == kept and found.left_out == 2000 - kept


def test_rows_are_drawn_alike(folder: Path) -> None:
    """Row groups are drawn equally often: the largest of 20 deviations lies within 5 standard
    errors, false alarms of 1e-5."""
    counts = np.zeros(2000)
    for seed in range(100):
        rows = pa.concat_tables(list(opened(folder, 0.1, seed).tables())[10:])
        counts[rows["age"].to_numpy().astype(int) - 1000] += 1
    groups = counts.reshape(20, 100).sum(axis=1)
    # 111 rows of a draw come from 4 or 5 groups, at most 25 from each.
    assert np.abs(groups - groups.mean()).max() < 5.0 * np.sqrt(100 * 0.22 * 0.78 * 25**2)


def test_an_older_log_without_a_column_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = log(10, range(4, 8), range(3), seed=1).drop_columns(["age"])
    other = LogSchema(context=ROWS.context[:1], action="item", reward="reward", pscore="pscore")
    write_log(tmp_path / "old", [rows], other)
    items = Catalogue(catalogue(range(4, 24)), ITEMS)
    with pytest.raises(DataError, match=r"incremental.replay.logs: .* no column 'age'"):
        replay(ParquetLog.open(folder / "0"), [str(tmp_path / "old")], items, 0.2, 0)
