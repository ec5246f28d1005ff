from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offtower.data.catalogue import Catalogue
from offtower.data.check import BadRowsError
from offtower.data.encoding import FeatureEncoding
from offtower.data.loading import Loader
from offtower.data.log import Log, ParquetLog, TableLog, write_log
from offtower.data.order import Cursor, EpochOrder
from offtower.data.reader import BatchReader, row_folds, scan
from offtower.data.schema import CatalogueSchema, FeatureSpec, LogSchema
from offtower.errors import ConfigError

SCHEMA = LogSchema(
    context=(
        FeatureSpec(name="x", kind="numeric"),
        FeatureSpec(name="v", kind="vector", dim=3),
        FeatureSpec(name="c", kind="category"),
        FeatureSpec(name="b", kind="bag"),
    ),
    pscore="pscore",
    user_id="user",
)
ITEMS = 6


@lru_cache(maxsize=64)
def make_table(n: int, bad: tuple[int, ...] = ()) -> pa.Table:
    rng = np.random.default_rng(n)
    pscore = rng.uniform(0.1, 1.0, n)
    pscore[list(bad)] = 2.0
    return pa.table(
        {
            "x": pa.array(np.arange(n, dtype=np.float64)),
            "v": pa.array(list(rng.standard_normal((n, 3))), pa.list_(pa.float64(), 3)),
            "c": pa.array([f"c{k}" for k in rng.integers(0, 4, n)], pa.string()),
            "b": pa.array(
                [[f"t{t}" for t in range(k)] for k in rng.integers(0, 3, n)], pa.list_(pa.string())
            ),
            "action": pa.array(rng.integers(0, ITEMS, n)),
            "reward": pa.array(np.arange(n) % 2.0),
            "pscore": pa.array(pscore),
            "user": pa.array(rng.integers(0, 10, n)),
        }
    )


@lru_cache(maxsize=1)
def make_catalogue() -> Catalogue:
    table = pa.table({"item_id": np.arange(ITEMS), "f": np.arange(ITEMS) / 2})
    features = (FeatureSpec(name="f", kind="numeric"),)
    return Catalogue.from_table(table, CatalogueSchema(item_id="item_id", features=features))


def make_log(n: int, rows_per_group: int = 10, bad: tuple[int, ...] = ()) -> TableLog:
    return TableLog(make_table(n, bad), SCHEMA, rows_per_group=rows_per_group)


encodings: WeakKeyDictionary[Log, FeatureEncoding] = WeakKeyDictionary()
"""Readers of one log share its encoding."""


def make_reader(
    log: Log,
    batch_size: int = 8,
    window_rows: int = 40,
    quarantine: Path | None = None,
    **options,
) -> BatchReader:
    order_options = {k: options.pop(k) for k in ("num_folds", "shuffle") if k in options}
    encoding = encodings.get(log)
    if encoding is None:
        tables = (log.read_row_group(i) for i in range(len(log.row_group_sizes)))
        encoding = encodings[log] = FeatureEncoding.fit(SCHEMA.context, tables)
    order = EpochOrder(log.row_group_sizes, batch_size, 3, window_rows=window_rows, **order_options)
    return BatchReader(Loader(log, make_catalogue(), encoding, quarantine), order, **options)


def reader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "offtower-reader"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    if reader_threads():
        gc.collect()
    assert reader_threads() == []


def row_numbers(steps: Iterator) -> list[list[int]]:
    return [rows.row.tolist() for _, rows, _ in steps]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@settings(max_examples=40)
@given(
    n=st.integers(1, 90),
    rows_per_group=st.integers(1, 30),
    window_rows=st.integers(1, 100),
    world_size=st.integers(1, 4),
    num_folds=st.integers(1, 3),
    prefetch=st.booleans(),
)
def test_every_row_once_over_all_workers(
    n: int, rows_per_group: int, window_rows: int, world_size: int, num_folds: int, prefetch: bool
) -> None:
    log = make_log(n, rows_per_group)
    readers = [
        make_reader(log, window_rows=window_rows, num_folds=num_folds, prefetch=prefetch)
        for _ in range(world_size)
    ]
    seen: list[int] = []
    workers = [r.epoch(1, rank=k, world_size=world_size) for k, r in enumerate(readers)]
    (whole,) = [make_reader(log, window_rows=window_rows, num_folds=num_folds)]
    for step in whole.epoch(1):
        parts = [next(worker) for worker in workers]
        assert {part.cursor for part in parts} == {step.cursor}
        assert {part.fold for part in parts} == {step.fold}
        assert {part.batch_rows for part in parts} == {len(step.rows.row)}
        joined = np.concatenate([part.rows.row for part in parts])
        np.testing.assert_array_equal(joined, step.rows.row)
        seen += joined.tolist()
    assert all(next(worker, None) is None for worker in workers)
    assert sorted(seen) == list(range(n))


def test_rows_carry_their_own_values() -> None:
    table = make_table(95)
    reader = make_reader(make_log(95))
    for _, rows, _ in reader.epoch(0):
        expected = table.take(pa.array(rows.row))
        np.testing.assert_array_equal(rows.action, expected["action"].to_numpy())
        np.testing.assert_array_equal(rows.reward, expected["reward"].to_numpy())
        np.testing.assert_array_equal(rows.pscore, expected["pscore"].to_numpy())
        lengths = np.diff(rows.context["b"].offsets)
        np.testing.assert_array_equal(lengths, [len(b) for b in expected["b"].to_pylist()])
        x = expected["x"].to_numpy()
        slope = np.polyfit(x, rows.context["x"], 1) if len(x) > 1 else None
        assert slope is None or slope[0] > 0


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("window_rows", [30, 1000])
def test_resuming_inside_an_epoch(prefetch: bool, window_rows: int) -> None:
    log = make_log(100)
    whole = list(make_reader(log, window_rows=window_rows).epoch(2))
    for stop in range(len(whole)):
        cursor = whole[stop].cursor
        reader = make_reader(log, window_rows=window_rows, prefetch=prefetch)
        rest = list(reader.epoch(2, start=cursor))
        assert row_numbers(rest) == row_numbers(whole[stop + 1 :])
        assert [s.cursor for s in rest] == [s.cursor for s in whole[stop + 1 :]]
    assert Cursor(2, 0, 0) < whole[0].cursor < whole[-1].cursor
    with pytest.raises(ConfigError, match="epoch 2 cannot start epoch 3"):
        make_reader(log).epoch(3, start=whole[0].cursor)
    with pytest.raises(ConfigError, match="rank"):
        make_reader(log).epoch(3, rank=2, world_size=2)


def test_resuming_at_another_number_of_workers() -> None:
    log = make_log(100)
    whole = list(make_reader(log).epoch(0))
    cursor = whole[4].cursor
    parts = [list(make_reader(log).epoch(0, cursor, rank=k, world_size=3)) for k in range(3)]
    for step, *workers in zip(whole[5:], *parts, strict=True):
        joined = np.concatenate([w.rows.row for w in workers])
        np.testing.assert_array_equal(joined, step.rows.row)


def test_a_small_log_is_encoded_once() -> None:
    log = make_log(60)
    reads = 0
    original = log.read_row_group

    def counting(i: int, columns: list[str] | None = None) -> pa.Table:
        nonlocal reads
        reads += 1
        return original(i, columns)

    reader = make_reader(log, window_rows=100)
    log.read_row_group = counting  # type: ignore[method-assign]
    first, second = row_numbers(reader.epoch(0)), row_numbers(reader.epoch(1))
    assert reads == 6
    assert first != second and sorted(flat(first)) == sorted(flat(second))
    del log.read_row_group  # type: ignore[method-assign]
    again = make_reader(log, window_rows=100, cache_bytes=0)
    assert row_numbers(again.epoch(0)) == first
    assert row_numbers(again.epoch(1)) == second


def test_no_shuffling_reads_the_file_in_order() -> None:
    reader = make_reader(make_log(60), shuffle=False)
    assert flat(row_numbers(reader.epoch(0))) == list(range(60))


def test_folds_follow_users() -> None:
    log = make_log(100)
    reader = make_reader(log, num_folds=3)
    folds_of_user: dict[int, set[int]] = {}
    users = log.read_row_group(0).column_names.index("user") and make_table(100)["user"].to_numpy()
    for _, rows, fold in reader.epoch(0):
        assert (row_folds(rows, 3, 3) == fold).all()
        for row in rows.row:
            folds_of_user.setdefault(int(users[row]), set()).add(fold)
    assert all(len(folds) == 1 for folds in folds_of_user.values())
    assert len(set.union(*folds_of_user.values())) > 1


def test_folds_can_be_given() -> None:
    reader = make_reader(
        make_log(100), num_folds=2, fold=lambda rows: (rows.row % 2).astype(np.int8)
    )
    for _, rows, fold in reader.epoch(0):
        assert (rows.row % 2 == fold).all()


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_bad_row_stops_the_consumer(prefetch: bool) -> None:
    log = make_log(100, bad=(57,))
    reader = make_reader(log, prefetch=prefetch)
    with pytest.raises(BadRowsError, match="pscore"):
        list(reader.epoch(0))
    assert reader_threads() == []


def test_bad_rows_are_set_aside_once(tmp_path: Path) -> None:
    log = make_log(100, bad=(3, 57, 58))
    reader = make_reader(log, quarantine=tmp_path / "quarantine")
    for epoch in range(3):
        rows = sorted(flat(row_numbers(reader.epoch(epoch))))
        assert rows == [r for r in range(100) if r not in (3, 57, 58)]
    assert reader.bad_rows == 3
    files = list((tmp_path / "quarantine").rglob("*.parquet"))
    written = pa.concat_tables([pa.parquet.read_table(f) for f in files])
    assert written.num_rows == 3


def test_leaving_early_ends_the_thread() -> None:
    log = make_log(200)
    reader = make_reader(log)
    steps = reader.epoch(0)
    next(steps)
    assert len(reader_threads()) == 1
    steps.close()  # type: ignore[attr-defined]
    assert reader_threads() == []
    for _ in reader.epoch(0):
        break  # the generator is dropped
    gc.collect()
    assert reader_threads() == []
    with pytest.raises(KeyboardInterrupt), make_reader(log) as reader:
        for _ in reader.epoch(0):
            raise KeyboardInterrupt
    assert reader_threads() == []
    kept = reader.epoch(1)
    next(kept)
    reader.close()
    assert reader_threads() == []
    assert next(kept, None) is None


def test_no_more_than_two_windows_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make_reader(make_log(400))
    alive, most = 0, 0
    lock = threading.Lock()
    original = reader._loader.load

    class Counted:
        def __init__(self) -> None:
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            with lock:
                alive -= 1

    def counting(groups, tables, stop):
        counter = Counted()
        rows = original(groups, tables, stop)
        object.__setattr__(rows, "counter", counter)
        return rows

    monkeypatch.setattr(reader._loader, "load", counting)
    steps = 0
    for _ in reader.epoch(0):
        time.sleep(0.002)
        steps += 1
    assert steps == 50
    assert most == 2
    assert alive == 0


def test_waiting_time_is_measured() -> None:
    reader = make_reader(make_log(200))
    assert reader.seconds_waiting == 0
    list(reader.epoch(0))
    first = reader.seconds_waiting
    assert first > 0
    list(reader.epoch(1))
    assert reader.seconds_waiting > first


def test_an_order_of_another_log_is_refused() -> None:
    log = make_log(50)
    encoding = FeatureEncoding.fit(SCHEMA.context, [make_table(50)])
    with pytest.raises(ConfigError, match="another log"):
        BatchReader(Loader(log, make_catalogue(), encoding), EpochOrder([50], 8, 0))


@pytest.mark.parametrize("batch_rows", [1, 7, 64, 1000])
def test_scan_keeps_the_order_of_the_file(batch_rows: int) -> None:
    log = make_log(100)
    encoding = FeatureEncoding.fit(SCHEMA.context, [make_table(100)])
    parts = list(scan(log, make_catalogue(), encoding, batch_rows))
    assert np.concatenate([p.row for p in parts]).tolist() == list(range(100))
    assert all(len(p.row) <= batch_rows for p in parts)
    assert len(parts) == -(-100 // batch_rows)


@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 12))
def test_a_range_of_rows_has_the_batches_of_the_whole(batch: int, first: int, more: int) -> None:
    log = make_log(100)
    encoding = FeatureEncoding.fit(SCHEMA.context, [make_table(100)])
    last = -(-100 // batch)
    first = min(first, last - 1)
    stop = min(first + 1 + more, last)
    rows = range(first * batch, min(stop * batch, 100))
    found = scan(log, make_catalogue(), encoding, batch, rows=rows, prefetch=more % 2 == 0)
    whole = list(scan(log, make_catalogue(), encoding, batch, prefetch=False))
    for one, other in zip(found, whole[first:stop], strict=True):
        np.testing.assert_array_equal(one.row, other.row)


def test_parquet_and_table_logs_read_alike(tmp_path: Path) -> None:
    log = make_log(100)
    write_log(tmp_path / "log", [make_table(100)], SCHEMA, rows_per_group=10)
    written = ParquetLog.open(tmp_path / "log")
    np.testing.assert_array_equal(written.row_group_sizes, log.row_group_sizes)
    for one, other in zip(make_reader(log).epoch(0), make_reader(written).epoch(0), strict=True):
        np.testing.assert_array_equal(one.rows.row, other.rows.row)
        np.testing.assert_array_equal(one.rows.context["v"], other.rows.context["v"])
