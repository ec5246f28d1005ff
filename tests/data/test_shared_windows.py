"""Workers that read their own row groups get the batches of workers that read everything."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offtower.data.check import BadRowsError
from offtower.data.encoded_cache import EncodedCache
from offtower.data.log import TableLog
from offtower.data.reader import BatchReader, Step
from offtower.data.row_batches import from_batch, to_batch
from offtower.data.rows import COLUMNS, EncodedRows
from tests.data.test_reader import make_log, make_reader


class Room:
    """What threads that stand for workers leave for each other."""

    def __init__(self, size: int) -> None:
        self.size, self._left = size, [None] * size
        self._barrier = threading.Barrier(size, timeout=30)

    def leave(self, rank: int, value: Any) -> list[Any]:
        self._left[rank] = value
        self._barrier.wait()
        found = list(self._left)
        self._barrier.wait()
        return found


class ThreadExchange:
    def __init__(self, room: Room, rank: int) -> None:
        self._room, self.rank, self.size = room, rank, room.size

    def gather_objects(self, value: Any) -> list[Any]:
        return self._room.leave(self.rank, value)

    def all_to_all(self, parts: Sequence[memoryview]) -> list[memoryview]:
        assert len(parts) == self.size
        return [theirs[self.rank] for theirs in self._room.leave(self.rank, list(parts))]

    def close(self) -> None:
        pass


def shared_reader(log: TableLog, room: Room, rank: int, cached: int, **options: Any) -> BatchReader:
    reader = make_reader(log, exchange=ThreadExchange(room, rank), **options)
    reader._loader._cache = EncodedCache(cached)
    return reader


def epochs(reader: BatchReader, rank: int, size: int, reads: list[list[int]]) -> list[list[Step]]:
    """Two epochs; also the row groups that were read in each."""
    log, found = reader._loader.log, []
    original = log.read_row_group

    def counting(index: int, columns: Any = None) -> pa.Table:
        reads[-1].append(index)
        return original(index, columns)

    log.read_row_group = counting  # type: ignore[method-assign]
    with reader:
        for epoch in range(2):
            reads.append([])
            found.append(list(reader.epoch(epoch, rank=rank, world_size=size)))
    return found


def assert_equal_rows(one: EncodedRows, two: EncodedRows) -> None:
    left, right = to_batch(one), to_batch(two)
    assert left.schema.equals(right.schema, check_metadata=True)
    assert left.equals(right)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 90),
    rows_per_group=st.integers(1, 30),
    window_rows=st.integers(1, 100),
    size=st.integers(1, 6),
    num_folds=st.integers(1, 3),
    cached=st.sampled_from([0, 2000, 2**20]),
    small=st.booleans(),
)
def test_steps_are_those_of_workers_that_read_everything(
    n: int,
    rows_per_group: int,
    window_rows: int,
    size: int,
    num_folds: int,
    cached: int,
    small: bool,
) -> None:
    """Bit for bit, with more workers than row groups too. Each row group is read by one worker,
    and not again where it is kept."""
    options = {"window_rows": window_rows, "num_folds": num_folds}
    options["cache_bytes"] = 2**29 if small else 0
    room = Room(size)
    reads: list[list[list[int]]] = [[] for _ in range(size)]
    with ThreadPoolExecutor(size) as threads:
        running = [
            threads.submit(
                epochs,
                shared_reader(make_log(n, rows_per_group), room, rank, cached, **options),
                *(rank, size, reads[rank]),
            )
            for rank in range(size)
        ]
        found = [one.result(timeout=60) for one in running]
    for rank in range(size):
        plain = make_reader(make_log(n, rows_per_group), **options)
        for epoch in range(2):
            wanted = list(plain.epoch(epoch, rank=rank, world_size=size))
            for a, b in zip(found[rank][epoch], wanted, strict=True):
                assert (a.cursor, a.fold, a.first) == (b.cursor, b.fold, b.first)
                assert_equal_rows(a.rows, b.rows)
                assert_equal_rows(a.joined, b.joined)
    groups = -(-n // rows_per_group)
    assert sorted(g for mine in reads for g in mine[0]) == list(range(groups))
    assert all(len(mine[0]) <= -(-groups // size) for mine in reads)
    if cached == 2**20:
        assert all(mine[1] == [] for mine in reads)


def test_a_bad_row_ends_all_workers_with_the_same_error() -> None:
    log = make_log(100, bad=(57, 31))
    room = Room(2)

    def read(rank: int) -> str:
        reader = shared_reader(log, room, rank, 0, window_rows=100, shuffle=False)
        with pytest.raises(BadRowsError) as raised, reader:
            list(reader.epoch(0, rank=rank, world_size=2))
        return str(raised.value)

    with ThreadPoolExecutor(2) as threads:
        one, two = threads.map(read, range(2))
    with pytest.raises(BadRowsError) as alone:
        list(make_reader(log, window_rows=100, shuffle=False).epoch(0))
    assert one == two == str(alone.value)


def test_the_cache_is_bounded_and_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = make_reader(make_log(20), batch_size=64).epoch(0)
    rows = step.rows
    cache = EncodedCache(rows.nbytes)
    cache.put(3, rows)
    cache.put(4, rows)
    assert 3 in cache and 4 not in cache
    assert_equal_rows(cache.get(3), rows)
    back = from_batch(to_batch(rows), None, None)
    assert all(getattr(back, name) is None for name in COLUMNS if getattr(rows, name) is None)
    assert back.context.keys() == rows.context.keys()
    assert np.array_equal(back.user_id, rows.user_id)

    def no_space(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    full = EncodedCache(2**20)
    monkeypatch.setattr("tempfile.TemporaryFile", no_space)
    full.put(0, rows)
    assert 0 not in full
