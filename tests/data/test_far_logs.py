"""Logs in stores: the same rows as on disk, few requests, and errors that say what to do."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from offtower.data import (
    BatchReader,
    EncodedRows,
    EpochOrder,
    FeatureEncoding,
    ParquetLog,
    scan,
    split_log,
    stores,
    validate_log,
    write_log,
)
from offtower.data import read_ahead as read_ahead_module
from offtower.data.loading import Loader
from offtower.data.location import Location
from offtower.data.manifest import FILE, WRITING
from offtower.errors import DataError
from tests.data.conftest import make_catalogue, make_schema, make_table
from tests.stores import in_memory, mounted, unruly


def same(one: EncodedRows, other: EncodedRows) -> bool:
    """The same bits."""
    return pickle.dumps(one) == pickle.dumps(other)


def batches(log: ParquetLog, window: int, batch: int, workers: int) -> list[EncodedRows]:
    encoding = FeatureEncoding.fit(log.schema.context, log.tables())
    order = EpochOrder(log.row_group_sizes, batch, seed=5, window_rows=window)
    found = []
    with BatchReader(Loader(log, make_catalogue(), encoding), order) as reader:
        for rank in range(workers):
            found += [step.rows for step in reader.epoch(1, rank=rank, world_size=workers)]
    return found + list(scan(log, make_catalogue(), encoding, batch))


@settings(max_examples=15)
@given(
    rows=st.integers(1, 400),
    group=st.integers(20, 130),
    files=st.integers(1, 3),
    window=st.integers(1, 300),
    batch=st.integers(7, 90),
    workers=st.integers(1, 3),
    listed=st.booleans(),
)
def test_the_same_batches_from_a_store(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    group: int,
    files: int,
    window: int,
    batch: int,
    workers: int,
    listed: bool,
) -> None:
    """Bit for bit, with and without a list of files, for any number of workers."""
    folder = tmp_path_factory.mktemp("here")
    sizes = {"rows_per_group": group, "rows_per_file": group * files}
    manifest = write_log(folder / "log", [make_table(rows)], make_schema(), **sizes)
    with pytest.MonkeyPatch.context() as patch:
        place = f"{in_memory(patch)}/logs/train"
        assert write_log(place, [make_table(rows)], make_schema(), **sizes) == manifest
        for found in Location.of(place).files():
            name = found.name
            assert found.location.read_bytes() == (folder / "log" / name).read_bytes()
        if not listed:
            (Location.of(place) / FILE).remove()
            (folder / "log" / FILE).unlink()
        here, there = (ParquetLog.open(one, make_schema()) for one in (folder / "log", place))
        assert there.fingerprint == here.fingerprint
        one, two = (batches(log, window, batch, workers) for log in (here, there))
        assert len(one) == len(two) and all(map(same, one, two))


def test_a_listed_log_opens_with_two_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for the manifest and one for the columns; without a list all footers, many at once."""
    handler, root = unruly(monkeypatch, tmp_path)
    table = make_table(200)
    write_log(f"{root}/log", [table], make_schema(), rows_per_group=2, rows_per_file=2)
    handler.opened.clear()
    log = ParquetLog.open(f"{root}/log")
    assert len(log.row_group_sizes) == 100
    assert handler.opened == {"log/_offtower.json": 1, "log/part-00000.parquet": 1}
    handler.opened.clear()
    handler.seconds = 0.005
    (tmp_path / "log" / FILE).unlink()
    again = ParquetLog.open(f"{root}/log", make_schema())
    assert again.row_group_sizes.tolist() == log.row_group_sizes.tolist()
    assert sum(handler.opened.values()) == 1 + 100 and 4 < handler.most <= 32


def test_missing_listed_files_are_refused_and_unlisted_ones_are_read(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [make_table(90)], make_schema(), 30, 30)
    pq.write_table(make_table(5), tmp_path / "log" / "part-00003.parquet")
    assert ParquetLog.open(tmp_path / "log").num_rows == 95
    (tmp_path / "log" / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00001\.parquet' is missing.*manifest lists \(1 of"):
        ParquetLog.open(tmp_path / "log")


def test_transient_read_errors_are_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of three openings of each file fail; all rows are read and the retries are logged.

    Threads share the openings of a file, so more attempts are allowed than by default.
    """
    monkeypatch.setattr(stores, "ATTEMPTS", 60)
    monkeypatch.setattr(stores, "PAUSE_SECONDS", 0.0)
    handler, root = unruly(monkeypatch, tmp_path)
    table = make_table(300)
    write_log(f"{root}/log", [table], make_schema(), 50, 100)
    tries: Counter[str] = Counter()

    def fail(path: str) -> None:
        tries[path] += 1
        if tries[path] % 3:
            raise OSError("AWS Error SLOW_DOWN during GetObject operation")

    handler.before = fail
    log = ParquetLog.open(f"{root}/log")
    assert pa.concat_tables(log.tables()).select(table.column_names).equals(table)
    assert "SLOW_DOWN" in caplog.text and "trying again" in caplog.text


def test_persistent_read_errors_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, root = unruly(monkeypatch, tmp_path)
    write_log(f"{root}/log", [make_table(300)], make_schema(), 50, 100)
    log = ParquetLog.open(f"{root}/log")
    handler.opened.clear()

    def fail(path: str) -> None:
        if path.endswith("part-00001.parquet"):
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28")

    handler.before = fail
    tables = log.tables()
    first = [next(tables), next(tables)]
    assert sum(table.num_rows for table in first) == 100
    with pytest.raises(DataError) as error:
        next(tables)
    assert f"row group 0 of '{root}/log/part-00001.parquet' cannot be read" in str(error.value)
    assert "NETWORK_CONNECTION" in str(error.value) and "endpoint_override" in str(error.value)
    with pytest.raises(DataError, match="row group 1 of"):
        log.read_row_group(3)
    assert handler.opened["log/part-00001.parquet"] <= 3 * stores.ATTEMPTS


def test_access_errors_are_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, root = unruly(monkeypatch, tmp_path)
    write_log(f"{root}/log", [make_table(30)], make_schema())
    log = ParquetLog.open(f"{root}/log")
    handler.opened.clear()

    def fail(path: str) -> None:
        raise OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body.")

    handler.before = fail
    with pytest.raises(DataError, match="AWS_ACCESS_KEY_ID"):
        log.read_row_group(0)
    assert sum(handler.opened.values()) == 1
    with pytest.raises(DataError, match="AWS_ACCESS_KEY_ID"):
        ParquetLog.open(f"{root}/log")


def test_files_that_vanish_or_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, root = unruly(monkeypatch, tmp_path)
    write_log(f"{root}/log", [make_table(100)], make_schema(), 50, 50)
    log = ParquetLog.open(f"{root}/log")
    write_log(tmp_path / "other", [make_table(99)], make_schema(), 99)
    (tmp_path / "other" / "part-00000.parquet").rename(tmp_path / "log" / "part-00000.parquet")
    (tmp_path / "log" / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00000\.parquet' has changed since it was opened"):
        log.read_row_group(0)
    with pytest.raises(DataError, match=r"part-00001\.parquet' was there when .* and is gone"):
        log.read_row_group(1)


def test_an_unresponsive_store_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The wait is logged and ends; closing a reader that waits does not hang."""
    handler, root = unruly(monkeypatch, tmp_path)
    write_log(f"{root}/log", [make_table(400)], make_schema(), 50, 50)
    log = ParquetLog.open(f"{root}/log")
    hang = threading.Event()
    handler.before = lambda path: None if path.endswith("00000.parquet") else hang.wait() and None
    monkeypatch.setattr(read_ahead_module, "WARN_AFTER_SECONDS", 0.05)
    monkeypatch.setenv(stores.TIMEOUT, "0.3")
    try:
        tables = log.tables()
        next(tables)
        with pytest.raises(DataError, match=r"no answer for .* row group 0 of .*part-00001"):
            next(tables)
        assert "waiting for row group 0 of" in caplog.text
        monkeypatch.setenv(stores.TIMEOUT, "600")
        encoding = FeatureEncoding.fit(log.schema.context, [make_table(50)])
        order = EpochOrder(log.row_group_sizes, 10, seed=5, shuffle=False, window_rows=50)
        with BatchReader(Loader(log, make_catalogue(), encoding), order) as reader:
            assert len(next(reader.epoch(0)).rows) == 10
    finally:
        hang.set()
    monkeypatch.setenv(stores.TIMEOUT, "soon")
    with pytest.raises(DataError, match="OFFTOWER_STORE_TIMEOUT='soon' must be a number"):
        log.read_row_group(0)


def test_a_missing_log_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    root = in_memory(monkeypatch)
    with pytest.raises(DataError, match="there is no log at 'test://b/log'; check the bucket"):
        ParquetLog.open(f"{root}/log")
    (Location.of(root) / "log/readme.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        ParquetLog.open(f"{root}/log")


def test_an_unfinished_output_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed writer leaves nothing; readers and writers refuse the files of a killed one."""
    root = in_memory(monkeypatch)
    table = make_table(100)
    other = table.set_column(0, "age", pa.array(["x"] * 100))
    with pytest.raises(DataError, match="column 'age' is double and then string"):
        write_log(f"{root}/log", [table, other], make_schema(), 50, 50)
    assert Location.of(f"{root}/log").files() == []
    write_log(f"{root}/log", [table], make_schema(), 50, 50)
    with pytest.raises(DataError, match="exists already"):
        write_log(f"{root}/log", [table], make_schema())
    # As a kill after the first file leaves it.
    folder = Location.of(f"{root}/log")
    (folder / FILE).remove()
    (folder / "part-00001.parquet").remove()
    (folder / WRITING).write_bytes(b"{}")
    with pytest.raises(DataError, match=r"the log at .* is incomplete"):
        ParquetLog.open(folder, make_schema())
    with pytest.raises(DataError, match="holds an output that was not finished"):
        write_log(folder, [table], make_schema())


def test_a_split_and_a_check_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a split are the same bytes, the findings the same numbers."""
    root = in_memory(monkeypatch)
    write_log(tmp_path / "log", [make_table(500)], make_schema(), 50, 100)
    write_log(f"{root}/log", [make_table(500)], make_schema(), 50, 100)
    here = split_log(tmp_path / "log", tmp_path / "parts", by="time")
    assert split_log(f"{root}/log", f"{root}/parts", by="time") == here
    parts = Location.of(f"{root}/parts")
    names = [found.name for found in parts.files()]
    assert len(names) == 6
    for name in names:
        assert (parts / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    with pytest.raises(DataError, match="exists already"):
        split_log(f"{root}/log", f"{root}/parts", by="time")
    one, two = (
        validate_log(ParquetLog.open(place), make_catalogue())
        for place in (tmp_path / "log", f"{root}/log")
    )
    assert one.to_dict() == two.to_dict()


def test_a_failed_split_removes_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, root = unruly(monkeypatch, tmp_path)
    write_log(f"{root}/log", [make_table(500)], make_schema(), 50, 100)
    seen = 0

    def fail(path: str) -> None:
        nonlocal seen
        seen += (tmp_path / "parts" / "train" / FILE).exists()
        if seen > 3:
            raise OSError("gone for good")

    handler.before = fail
    with pytest.raises(DataError, match="gone for good"):
        split_log(f"{root}/log", f"{root}/parts", by="row")
    assert [path for path in (tmp_path / "parts").rglob("*") if path.is_file()] == []


def test_mounted_file_systems_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is sent to another process reads the same; so does one below a subtree."""
    tree = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    root = mounted(monkeypatch, tree)
    write_log(tmp_path / "log", [make_table(100)], make_schema(), 50)
    log = ParquetLog.open(f"{root}/log")
    log.read_row_group(0)
    sent = pickle.loads(pickle.dumps(log))
    assert sent.read_row_group(1).equals(ParquetLog.open(tmp_path / "log").read_row_group(1))
    assert np.array_equal(sent.row_group_sizes, log.row_group_sizes)


def test_bad_rows_in_a_store_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    root = in_memory(monkeypatch)
    table = make_table(100)
    number = table.schema.get_field_index("pscore")
    values = table["pscore"].to_numpy().copy()
    values[71] = 2.0
    write_log(
        f"{root}/log", [table.set_column(number, "pscore", pa.array(values))], make_schema(), 50
    )
    log = ParquetLog.open(f"{root}/log")
    encoding = FeatureEncoding.fit(log.schema.context, [table])
    with pytest.raises(DataError) as error:
        list(scan(log, make_catalogue(), encoding, 50))
    named = f"{root}/log/part-00000.parquet, row 71 of the file, row group 1, row 71 of the log"
    assert named in str(error.value)
    folder = Location.of(f"{root}/aside")
    rows = scan(log, make_catalogue(), encoding, 50, quarantine=folder)
    assert sum(len(one) for one in rows) == 99
    assert len(folder.files()) == 1
