from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv

from offtower.data import BadRowsError, LogSchema, ParquetLog, RowChecker, check_table
from offtower.data.ingest import IngestSource, ingest_files
from offtower.data.log import TableOrigin
from offtower.errors import DataError
from offtower.execution import LOCAL
from tests.data.conftest import make_catalogue, make_schema, make_table
from tests.mappers import BACKWARDS

PSCORE = "a probability in (0, 1]"
REWARD = "a number in [0, 1], the schema's reward_range"
VECTOR = "a list of 3 finite numbers"
ITEM = "the id of an item in the catalogue (4 items)"

# column, bad value, value as printed, problem, expected
BAD: list[tuple[str, Any, str, str, str]] = [
    ("pscore", None, "null", "null", PSCORE),
    ("pscore", math.nan, "nan", "NaN", PSCORE),
    ("pscore", math.inf, "inf", "infinite", PSCORE),
    ("pscore", 0.0, "0.0", "zero", PSCORE),
    ("pscore", -0.25, "-0.25", "negative", PSCORE),
    ("pscore", 1.5, "1.5", "above 1", PSCORE),
    ("reward", None, "null", "null", REWARD),
    ("reward", math.nan, "nan", "NaN", REWARD),
    ("reward", -math.inf, "-inf", "infinite", REWARD),
    ("reward", -0.5, "-0.5", "below 0", REWARD),
    ("reward", 2.0, "2.0", "above 1", REWARD),
    ("age", None, "null", "null", "a finite number"),
    ("age", math.nan, "nan", "NaN", "a finite number"),
    ("age", math.inf, "inf", "infinite", "a finite number"),
    ("taste", None, "null", "null", VECTOR),
    ("taste", [1.0, None, 2.0], "[1.0, None, 2.0]", "null inside", VECTOR),
    ("taste", [1.0, math.nan, 2.0], "[1.0, nan, 2.0]", "NaN inside", VECTOR),
    ("taste", [1.0, math.inf, 2.0], "[1.0, inf, 2.0]", "infinite inside", VECTOR),
    ("taste", [1.0], "[1.0]", "of wrong length", VECTOR),
    ("taste", [], "[]", "of wrong length", VECTOR),
    ("action", "boot", "'boot'", "an unknown item", ITEM),
    ("action", None, "null", "null", ITEM),
    ("time", None, "null", "null", "a time"),
    ("position", None, "null", "null", "an integer"),
    ("user", None, "null", "null", "text or an integer"),
]


def with_cell(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table.column(column).to_pylist()
    values[row] = value
    number = table.schema.get_field_index(column)
    field = table.schema.field(column)
    return table.set_column(number, field, pa.array(values, field.type))


@pytest.mark.parametrize(("column", "value", "shown", "problem", "expected"), BAD)
def test_each_bad_value_has_its_exact_error(
    column: str, value: Any, shown: str, problem: str, expected: str
) -> None:
    table = with_cell(make_table(6), column, 4, value)
    (bad,) = check_table(table, make_schema(), make_catalogue(), TableOrigin("log", 2), 100)
    assert (bad.row, bad.row_group, bad.column) == (104, 2, column)
    assert (bad.value, bad.problem, bad.expected) == (shown, problem, expected)
    why = "" if problem.lower() == shown else f" ({problem})"
    assert str(bad) == (
        f"log, row group 2, row 104 of the log: column '{column}' is {shown}{why}, "
        f"expected {expected}"
    )


@settings(max_examples=60)
@given(
    n=st.integers(1, 30),
    seed=st.integers(0, 1000),
    cells=st.lists(st.tuples(st.integers(0, 29), st.sampled_from(range(len(BAD)))), max_size=12),
)
def test_exactly_the_bad_cells_are_found(n: int, seed: int, cells: list[tuple[int, int]]) -> None:
    table = make_table(n, seed)
    wanted: dict[tuple[int, str], str] = {}
    for row, kind in cells:
        column, value, _, problem, _ = BAD[kind]
        table = with_cell(table, column, row % n, value)
        wanted[row % n, column] = problem
    found = check_table(table, make_schema(), make_catalogue(), TableOrigin("log", 0), 0)
    assert {(bad.row, bad.column): bad.problem for bad in found} == wanted
    assert len(found) == len(wanted)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 3)]
)
def test_every_list_type_is_checked(kind: pa.DataType) -> None:
    table = make_table(5)
    values = table.column("taste").to_pylist()
    values[1], values[3] = None, [1.0, math.nan, 0.0]
    table = table.set_column(1, "taste", pa.array(values, kind))
    found = check_table(table, make_schema(), make_catalogue(), TableOrigin("log", 0), 0)
    assert [(bad.row, bad.problem) for bad in found] == [(1, "null"), (3, "NaN inside")]


def test_wrong_types_and_missing_columns_are_refused_for_the_file() -> None:
    table, schema, catalogue = make_table(3), make_schema(), make_catalogue()
    with pytest.raises(DataError, match=r"^f has no column 'pscore'; it has age, taste"):
        check_table(table.drop_columns(["pscore"]), schema, catalogue, TableOrigin("f", 0), 0)
    for column, values, message in [
        ("reward", ["x"] * 3, "f: column 'reward' holds string, expected numbers"),
        ("taste", [1.0] * 3, "f: column 'taste' holds double, expected lists of numbers"),
        ("tags", ["x"] * 3, "f: column 'tags' holds string, expected lists of text or integers"),
        ("action", [1, 2, 3], "f: column 'action' holds int64, expected text, as the item ids"),
        ("position", ["x"] * 3, "f: column 'position' holds string, expected integers"),
    ]:
        number = table.schema.get_field_index(column)
        with pytest.raises(DataError) as caught:
            check_table(
                table.set_column(number, column, pa.array(values)),
                schema,
                catalogue,
                TableOrigin("f", 0),
                0,
            )
        assert str(caught.value).startswith(message)


def test_the_row_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "part.parquet"
    table = with_cell(make_table(10), "pscore", 7, 0.0)
    pq.write_table(table, file, row_group_size=4)
    log = ParquetLog.open(file, make_schema())
    group, origin = log.read_row_group(1), log.location(1)
    (bad,) = check_table(group, make_schema(), make_catalogue(), origin, 1004)
    assert (bad.file_row, bad.row) == (7, 1007)
    assert f"{file}, row 7 of the file, row group 1, row 1007 of the log" in str(bad)


@pytest.mark.parametrize("distributed", [False, True])
def test_an_ingest_names_the_file_and_the_row_in_it(tmp_path: Path, distributed: bool) -> None:
    """Of the second of three files, in its third row group, and of a CSV file."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        table = make_table(90)
        bad = with_cell(table, "pscore", 71, 0.0) if number == 1 else table
        pq.write_table(bad, source / f"{number}.parquet", row_group_size=30)
    execution = BACKWARDS if distributed else LOCAL
    with pytest.raises(BadRowsError) as error:
        ingest_files(IngestSource(source, make_schema()), tmp_path / "out", execution=execution)
    (bad,) = error.value.rows
    assert (bad.file, bad.file_row, bad.row) == (str(source / "1.parquet"), 71, 161)
    assert f"{source}/1.parquet, row 71 of the file, row 161 of the log" in str(bad)
    file = tmp_path / "source.csv"
    plain = LogSchema(action="action", reward="reward", pscore="pscore")
    columns = with_cell(make_table(90), "pscore", 80, 0.0).select(list(plain.columns))
    csv.write_csv(columns, file)
    with pytest.raises(BadRowsError) as error:
        ingest_files(IngestSource(file, plain), tmp_path / "out", execution=execution)
    (bad,) = error.value.rows
    assert (bad.file, bad.file_row, bad.row) == (str(file), 80, 80)


def test_the_error_shows_the_first_rows_and_counts_the_rest() -> None:
    table = make_table(50)
    for row in range(10, 40):
        table = with_cell(table, "reward", row, 3.0)
    with pytest.raises(BadRowsError) as caught:
        RowChecker(make_schema(), make_catalogue()).check(table, TableOrigin("log", 0), 0)
    assert [bad.row for bad in caught.value.rows] == list(range(10, 20))
    assert caught.value.counts == {("reward", "above 1"): 30}
    assert str(caught.value).startswith("30 bad values in the log:")
    assert "30 x column 'reward' is above 1" in str(caught.value)


def test_quarantine_keeps_every_row_and_its_reason(tmp_path: Path) -> None:
    table = with_cell(make_table(20), "reward", 3, 9.0)
    table = with_cell(with_cell(table, "pscore", 3, 0.0), "action", 11, "boot")
    checker = RowChecker(make_schema(), make_catalogue(), quarantine=tmp_path)
    for _ in range(2):  # a second epoch counts nothing twice
        good = checker.check(table, TableOrigin("log", 0), 40)
    checker.check(table.slice(0, 4), TableOrigin("other log", 0), 40)
    assert good.num_rows == 18
    assert checker.bad_rows == 3
    assert checker.counts["pscore", "zero"] == 2
    files = sorted(tmp_path.glob("*.parquet"))
    assert len(files) == 2
    aside = pa.concat_tables([pq.read_table(file) for file in files])
    assert sorted(aside.column("_row").to_pylist()) == [43, 43, 51]
    reasons = " ".join(aside.column("_reason").to_pylist())
    assert "9.0 (above 1)" in reasons and "0.0 (zero)" in reasons and "'boot'" in reasons


def test_an_invalid_first_vector_does_not_invalidate_others() -> None:
    schema = make_schema()
    free = type(schema).from_dict(
        {**schema.to_dict(), "context": [{"name": "taste", "kind": "vector"}]}
    )
    table = with_cell(make_table(5), "taste", 0, None)
    found = check_table(table, free, make_catalogue(), TableOrigin("log", 0), 0)
    assert [bad.row for bad in found] == [0]
