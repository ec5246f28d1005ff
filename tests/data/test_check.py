"""The row check: every kind of bad value gives its exact error, and nothing else does."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offtower.data import (
    BadRowsError,
    Catalogue,
    FeatureSpec,
    LogSchema,
    ParquetLog,
    RowChecker,
    check_table,
)
from offtower.errors import DataError

SCHEMA = LogSchema(
    context=(
        FeatureSpec(name="age", kind="numeric"),
        FeatureSpec(name="vec", kind="vector", dim=2),
        FeatureSpec(name="country", kind="category"),
        FeatureSpec(name="tags", kind="bag"),
    ),
    timestamp="time",
    behavior_policy="policy",
    user_id="user",
)
CATALOGUE = Catalogue.from_arrays(["a", "b", "c"], {"f": np.zeros(3)})
PLACE = ("log/part-0.parquet", 3)

NAN, INF = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "action": ["zzz", None, ""],
    "reward": [None, NAN, INF, -INF, 1.5, -0.1],
    "pscore": [None, NAN, INF, 0.0, -0.5, 1.0000001, 2.0],
    "age": [None, NAN, INF],
    "vec": [None, [1.0], [1.0, 2.0, 3.0], [NAN, 0.0], [0.0, INF], [], [None, 1.0]],
    "time": [None],
    "policy": [None],
    "user": [None],
}
EXPECTED = {
    "action": "the id of an item in the catalogue (3 items)",
    "reward": "a number in [0, 1]",
    "pscore": "a probability in (0, 1]",
    "age": "a finite number",
    "vec": "a list of 2 finite numbers",
    "time": "a time",
    "policy": "a value",
    "user": "a value",
}


def good_rows(n: int, seed: int = 0) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "age": rng.normal(size=n).tolist(),
        "vec": rng.normal(size=(n, 2)).tolist(),
        "country": [["de", "fr", None][i] for i in rng.integers(0, 3, n)],
        "tags": [[["x"], [], None, ["x", "y"]][i] for i in rng.integers(0, 4, n)],
        "action": [["a", "b", "c"][i] for i in rng.integers(0, 3, n)],
        "reward": rng.integers(0, 2, n).astype(float).tolist(),
        "pscore": (1.0 - rng.random(n)).tolist(),
        "time": [datetime.datetime(1960, 1, 1) + datetime.timedelta(days=i) for i in range(n)],
        "policy": ["p"] * n,
        "user": rng.integers(0, 5, n).tolist(),
    }


def table(rows: dict[str, list[Any]]) -> pa.Table:
    types = {
        "age": pa.float64(),
        "vec": pa.list_(pa.float64()),
        "country": pa.string(),
        "tags": pa.list_(pa.string()),
        "action": pa.string(),
        "reward": pa.float64(),
        "pscore": pa.float64(),
        "time": pa.timestamp("us"),
        "policy": pa.string(),
        "user": pa.int64(),
    }
    return pa.table({name: pa.array(rows[name], kind) for name, kind in types.items()})


@pytest.mark.parametrize(
    ("column", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_each_bad_value_gives_its_exact_error(column: str, value: Any) -> None:
    rows = good_rows(4)
    rows[column][2] = value
    found = check_table(table(rows), SCHEMA, CATALOGUE, PLACE, first_row=100)
    assert len(found) == 1
    shown = "null" if value is None else repr(value)
    assert str(found[0]) == (
        f"log/part-0.parquet, row group 3, row 102: column '{column}' is {shown}, "
        f"expected {EXPECTED[column]}"
    )


@given(data=st.data(), n=st.integers(1, 30), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_exactly_the_injected_cells_are_found(data: st.DataObject, n: int, seed: int) -> None:
    rows = good_rows(n, seed)
    cells = data.draw(
        st.lists(
            st.tuples(st.sampled_from(sorted(BAD)), st.integers(0, n - 1)), unique=True, max_size=8
        )
    )
    for column, row in cells:
        rows[column][row] = data.draw(st.sampled_from(BAD[column]))
    found = check_table(table(rows), SCHEMA, CATALOGUE, PLACE, first_row=7)
    assert {(bad.column, bad.row - 7) for bad in found} == set(cells)
    assert len(found) == len(cells)


@given(
    pscore=st.floats(allow_nan=True, allow_infinity=True, width=64),
    reward=st.floats(allow_nan=True, allow_infinity=True, width=64),
)
def test_any_float_is_judged_as_the_schema_says(pscore: float, reward: float) -> None:
    rows = good_rows(1)
    rows["pscore"], rows["reward"] = [pscore], [reward]
    found = {bad.column for bad in check_table(table(rows), SCHEMA, CATALOGUE, PLACE, 0)}
    assert ("pscore" in found) == (not 0.0 < pscore <= 1.0)
    assert ("reward" in found) == (not 0.0 <= reward <= 1.0)


def test_error_names_the_first_rows_and_counts_all() -> None:
    rows = good_rows(50)
    rows["pscore"] = [0.0] * 50
    rows["action"][1] = None
    with pytest.raises(BadRowsError) as caught:
        RowChecker(SCHEMA, CATALOGUE).check(table(rows), PLACE, 0)
    text = str(caught.value)
    assert text.startswith("51 bad values in the log:\n")
    assert "row 0: column 'pscore' is 0.0, expected a probability in (0, 1]" in text
    assert "50 x column 'pscore', expected a probability in (0, 1]" in text
    assert "--on-bad-rows quarantine" in text
    assert len(caught.value.rows) == 10


def test_quarantine_keeps_bad_rows_with_reasons_and_counts_once(tmp_path: Path) -> None:
    rows = good_rows(10)
    rows["pscore"][3], rows["reward"][3], rows["action"][8] = None, 7.0, "zzz"
    checker = RowChecker(SCHEMA, CATALOGUE, quarantine=tmp_path / "q")
    for _ in range(2):  # A second epoch reads the same rows.
        good = checker.check(table(rows), PLACE, 40)
        assert good.num_rows == 8
    assert checker.bad_rows == 2
    aside = pq.read_table(tmp_path / "q")
    assert aside.num_rows == 2
    reasons = aside.column("_reason").to_pylist()
    assert "row 43: column 'pscore' is null" in reasons[0]
    assert "row 43: column 'reward' is 7.0" in reasons[0]
    assert "row 48: column 'action' is 'zzz'" in reasons[1]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("pscore", ["x", "y"], "column 'pscore' holds string, expected numbers"),
        ("action", [1.5, 2.5], "column 'action' holds double, expected text or integers"),
        ("vec", ["x", "y"], "column 'vec' holds string, expected lists of numbers"),
        ("tags", ["x", "y"], "column 'tags' holds string, expected lists of text or integers"),
        ("age", [[1.0], [2.0]], "column 'age' holds list"),
    ],
)
def test_types_that_can_never_be_right(column: str, values: list[Any], message: str) -> None:
    good = table(good_rows(2))
    bad = good.set_column(good.column_names.index(column), column, pa.array(values))
    with pytest.raises(DataError, match=message.replace("(", "\\(")):
        check_table(bad, SCHEMA, CATALOGUE, PLACE, 0)


def write(path: Path, content: pa.Table) -> Path:
    path.mkdir(exist_ok=True)
    pq.write_table(content, path / "part-0.parquet")
    return path


def test_missing_column(tmp_path: Path) -> None:
    path = write(tmp_path / "log", table(good_rows(3)).drop_columns(["pscore"]))
    with pytest.raises(DataError, match=r"part-0.parquet' has no column 'pscore'"):
        ParquetLog.open(path, SCHEMA)


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"hello")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        ParquetLog.open(tmp_path, SCHEMA)


def test_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "log", table(good_rows(100))) / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="truncated"):
        ParquetLog.open(path.parent, SCHEMA)


def test_damage_inside_a_row_group_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "log", table(good_rows(5000))) / "part-0.parquet"
    log = ParquetLog.open(path.parent, SCHEMA)
    content = bytearray(path.read_bytes())
    content[100:2000] = b"\xff" * 1900
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="row group 0 of"):
        log.read_row_group(0)


def test_empty_directory_missing_directory_and_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no .parquet file"):
        ParquetLog.open(tmp_path, SCHEMA)
    with pytest.raises(DataError, match="there is no log at"):
        ParquetLog.open(tmp_path / "none", SCHEMA)
    path = write(tmp_path / "log", table(good_rows(3)).slice(0, 0))
    with pytest.raises(DataError, match="has no rows"):
        ParquetLog.open(path, SCHEMA)


def test_files_whose_columns_differ(tmp_path: Path) -> None:
    good = table(good_rows(3))
    path = write(tmp_path / "log", good)
    other = good.set_column(5, "reward", good.column("reward").cast(pa.float32()))
    pq.write_table(other, path / "part-1.parquet")
    with pytest.raises(DataError, match="column 'reward' is float in .*part-1.* but double in"):
        ParquetLog.open(path, SCHEMA)


def test_a_log_without_manifest_needs_a_schema(tmp_path: Path) -> None:
    path = write(tmp_path / "log", table(good_rows(3)))
    with pytest.raises(DataError, match="data.log_schema"):
        ParquetLog.open(path)
