from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offtower.data.log import ParquetLog, TableLog
from offtower.data.schema import FeatureSpec, LogSchema
from offtower.data.split import _quantiles, split_log
from offtower.errors import DataError
from offtower.mapping import Mapper


def make_log(
    timestamp: pa.Array | None = None, n: int = 1000, rows_per_group: int = 64, **columns: pa.Array
) -> TableLog:
    timestamp = pa.array(np.arange(n)) if timestamp is None else timestamp
    n = len(timestamp)
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "x": pa.array(rng.standard_normal(n)),
            "action": pa.array(rng.integers(0, 5, n)),
            "reward": pa.array(rng.integers(0, 2, n).astype(np.float64)),
            "time": timestamp,
            "row": pa.array(np.arange(n)),
            **columns,
        }
    )
    schema = LogSchema(
        context=(FeatureSpec(name="x", kind="numeric"),),
        pscore=None,
        timestamp="time",
        user_id="user" if "user" in columns else None,
        round_id="round" if "round" in columns else None,
    )
    return TableLog(table, schema, rows_per_group=rows_per_group)


def read(path: Path) -> pa.Table:
    """All columns, those beyond the schema too."""
    assert ParquetLog.open(path).num_rows > 0
    return pq.read_table(path)


def test_by_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    times = rng.permutation(1000)
    log = make_log(pa.array(times * 1_000_000, pa.timestamp("us")))
    counts = split_log(log, tmp_path / "out", by="time")
    assert counts == {"train": 600, "validation": 200, "test": 200}
    parts = [read(tmp_path / "out" / name) for name in counts]
    seconds = [part["time"].cast(pa.int64()).to_numpy() // 1_000_000 for part in parts]
    np.testing.assert_array_equal(np.sort(seconds[0]), np.arange(600))
    np.testing.assert_array_equal(np.sort(seconds[2]), np.arange(800, 1000))
    for part in parts:  # the order of rows and all columns are kept
        assert (np.diff(part["row"].to_numpy()) > 0).all()
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")] == []


def test_rows_of_one_time_stay_together(tmp_path: Path) -> None:
    log = make_log(pa.array(np.repeat(np.arange(10), 100)))
    counts = split_log(log, tmp_path, fractions=(0.55, 0.45), names=("a", "b"))
    assert counts == {"a": 500, "b": 500}


@pytest.mark.parametrize(
    "times",
    [
        pa.array([0] * 60 + [5000] * 40, pa.timestamp("ns", tz="UTC")),
        pa.array(np.arange(-50, 50, dtype=np.int32)).cast(pa.date32()),
        pa.array(np.arange(-50, 50) / 7.0),
        pa.array(np.arange(-50, 50), pa.int32()),
        pa.array(1000 * np.arange(100), pa.timestamp("ns", tz="Asia/Tokyo")),
    ],
)
def test_kinds_of_times(tmp_path: Path, times: pa.Array) -> None:
    counts = split_log(make_log(times), tmp_path, fractions=(0.6, 0.4), names=("a", "b"))
    assert counts == {"a": 60, "b": 40}


@settings(max_examples=60)
@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5), min_size=1, max_size=40),
    shares=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3).map(sorted),
)
def test_quantiles_are_order_statistics(values: list[int], shares: list[float]) -> None:
    log = make_log(pa.array(values, pa.int64()), rows_per_group=7)
    cuts = _quantiles(log, "time", np.array(shares), Mapper())
    ordered = sorted(values)
    expected = [ordered[min(round(s * len(values)), len(values) - 1)] for s in shares]
    assert [int(cut) - 2**63 for cut in cuts] == expected


@pytest.mark.parametrize("kind", ["integer", "string"])
@pytest.mark.parametrize("by", ["user", "round"])
def test_by_key(tmp_path: Path, by: str, kind: str) -> None:
    keys = np.random.default_rng(2).integers(0, 300, 3000)
    column = pa.array(keys) if kind == "integer" else pa.array([f"u{k}" for k in keys])
    log = make_log(n=3000, **{by: column})
    counts = split_log(log, tmp_path, by=by, fractions=(0.5, 0.5), names=("a", "b"), seed=3)
    a, b = (set(read(tmp_path / name)[by].to_pylist()) for name in counts)
    assert not a & b
    # 300 keys: binomial standard deviation 8.7; 5 of them: false alarm 6e-7 per case
    assert abs(len(a) - 150) < 5 * 8.7
    assert sum(counts.values()) == 3000


def test_by_row_and_seeds(tmp_path: Path) -> None:
    log = make_log(n=4000)
    first = split_log(log, tmp_path / "1", by="row", seed=1)
    split_log(log, tmp_path / "again", by="row", seed=1)
    split_log(make_log(n=4000, rows_per_group=1000), tmp_path / "groups", by="row", seed=1)
    split_log(log, tmp_path / "2", by="row", seed=2)
    # binomial standard deviation at most 31
    assert abs(first["train"] - 2400) < 5 * 31
    rows = {
        k: read(tmp_path / k / "train")["row"].to_pylist() for k in ("1", "again", "groups", "2")
    }
    assert rows["1"] == rows["again"] == rows["groups"]
    assert rows["1"] != rows["2"]


def test_a_directory_is_split_as_well(tmp_path: Path) -> None:
    split_log(make_log(), tmp_path / "a", by="row")
    counts = split_log(str(tmp_path / "a" / "train"), tmp_path / "b", by="time")
    whole = read(tmp_path / "a" / "train")
    parts = [read(tmp_path / "b" / name) for name in counts]
    assert pa.concat_tables(parts).sort_by("row").equals(whole.sort_by("row"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    with pytest.raises(DataError, match=r"validation' exists already"):
        split_log(make_log(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["validation"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log()
    reads = 0
    original = TableLog.read_row_group

    def failing(self: TableLog, i: int, columns: list[str] | None = None) -> pa.Table:
        nonlocal reads
        reads += 1
        if "x" in (columns or []) and reads > 40:
            raise OSError("disk gone")
        return original(self, i, columns)

    monkeypatch.setattr(TableLog, "read_row_group", failing)
    with pytest.raises(OSError, match="disk gone"):
        split_log(log, tmp_path / "out", by="row")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "user"}, "user_id column"),
        ({"by": "round"}, "round_id column"),
        ({"by": "luck"}, "not by 'luck'"),
        ({"fractions": (0.5, 0.4), "names": ("a", "b")}, "add up to 1"),
        ({"fractions": (0.5, 0.5)}, "do not fit"),
        ({"fractions": (1.2, -0.2), "names": ("a", "b")}, "positive"),
        ({"fractions": (0.5, 0.5), "names": ("a", "a")}, "must differ"),
        ({"fractions": (0.5, 0.5), "names": ("a", "../b")}, "plain folder name"),
    ],
)
def test_refusals(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_log(make_log(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (pa.array([1, None] * 5), "nulls"),
        (pa.array([1.0, float("nan")] * 5), "NaN"),
        (pa.array(["monday"] * 10), "holds no times"),
        (pa.array([7] * 10), "part 'train' would be empty"),
    ],
)
def test_times_that_cannot_be_split(tmp_path: Path, times: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_log(make_log(times), tmp_path / "out")
