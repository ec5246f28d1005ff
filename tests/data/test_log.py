from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offtower.atomic import write_text
from offtower.data import (
    Catalogue,
    CatalogueSchema,
    ParquetLog,
    TableLog,
    write_catalogue,
    write_log,
)
from offtower.errors import DataError
from tests.data.conftest import make_schema, make_table


def test_written_and_read_again(tmp_path: Path) -> None:
    table, schema = make_table(1000), make_schema()
    batches = [table.slice(i, 130) for i in range(0, 1000, 130)]
    manifest = write_log(tmp_path / "log", batches, schema, rows_per_group=64, rows_per_file=300)
    log = ParquetLog.open(tmp_path / "log")
    assert log.schema == schema and log.num_rows == manifest["num_rows"] == 1000
    assert manifest["fingerprint"] == log.fingerprint
    assert set(log.row_group_sizes.tolist()) == {64, 1000 % 64}
    assert pa.concat_tables(log.tables()).select(table.column_names).equals(table)
    assert len({log.location(i)[0] for i in range(len(log.row_group_sizes))}) == 4
    assert log.first_rows[3] == 192
    assert log.read_row_group(0, ["reward"]).column_names == ["reward"]
    with pytest.raises(DataError, match="exists already"):
        write_log(tmp_path / "log", [table], schema)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    table = make_table(10)
    other = table.set_column(0, "age", pa.array(["x"] * 10))
    with pytest.raises(DataError, match="column 'age' is double and then string"):
        write_log(tmp_path / "log", [table, other], make_schema())
    with pytest.raises(DataError, match="no rows to write"):
        write_log(tmp_path / "log", [], make_schema())
    assert list(tmp_path.iterdir()) == []


def test_a_log_is_no_catalogue_and_a_catalogue_no_log(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [make_table(10)], make_schema())
    with pytest.raises(DataError, match="/log' holds a log, and a catalogue belongs here"):
        Catalogue.open(tmp_path / "log")
    items = pa.table({"item_id": ["a", "b"]})
    write_catalogue(tmp_path / "items", items, CatalogueSchema())
    with pytest.raises(DataError, match="/items' holds a catalogue, and a log belongs here"):
        ParquetLog.open(tmp_path / "items")


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        write_text(tmp_path, "text")
    assert caught.value.filename == str(tmp_path)


def test_malformed_logs_are_refused_by_name(tmp_path: Path) -> None:
    schema, table = make_schema(), make_table(10)
    with pytest.raises(DataError, match="there is no log at"):
        ParquetLog.open(tmp_path / "nowhere", schema)
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        ParquetLog.open(tmp_path, schema)
    file = tmp_path / "a.parquet"
    pq.write_table(table, file)
    with pytest.raises(
        DataError, match=r"was not written by offtower.*run offtower ingest.*data\.log_schema"
    ):
        ParquetLog.open(tmp_path)
    whole = file.read_bytes()
    for content in (whole[:-100], b"action,reward\n1,0\n", b""):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet' is not a readable Parquet file"):
            ParquetLog.open(tmp_path, schema)
    pq.write_table(table.slice(0, 0), file)
    with pytest.raises(DataError, match="has no rows"):
        ParquetLog.open(tmp_path, schema)
    pq.write_table(table.drop_columns(["pscore"]), file)
    with pytest.raises(DataError, match=r"a\.parquet' has no column 'pscore'"):
        ParquetLog.open(tmp_path, schema)
    pq.write_table(table, file)
    number = table.schema.get_field_index("reward")
    changed = table.set_column(number, "reward", pa.array([0] * 10))
    pq.write_table(changed, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"'reward' is int64 in '.*b\.parquet' but double in"):
        ParquetLog.open(tmp_path, schema)


def test_whether_nulls_are_allowed_is_no_difference(tmp_path: Path) -> None:
    table = make_table(10)
    strict = pa.schema([f.with_nullable(f.name != "reward") for f in table.schema])
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.cast(strict), tmp_path / "b.parquet")
    assert ParquetLog.open(tmp_path, make_schema()).num_rows == 20


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [make_table(1000)], make_schema(), rows_per_group=500)
    log = ParquetLog.open(tmp_path / "log")
    file = Path(log.location(1)[0])
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"row group 1 of .* cannot be read"):
        log.read_row_group(1)


def test_table_log() -> None:
    log = TableLog(make_table(10), make_schema(), rows_per_group=4)
    np.testing.assert_array_equal(log.row_group_sizes, [4, 4, 2])
    assert pa.concat_tables(log.tables()).equals(make_table(10))
    assert log.fingerprint != TableLog(make_table(10, seed=1), make_schema()).fingerprint
    with pytest.raises(DataError, match="no rows"):
        TableLog(make_table(0), make_schema())
