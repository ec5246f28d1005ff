"""Batches of encoded rows from a log, read ahead by a thread, in a resumable order."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.loading import Loader, closing_tables
from offtower.data.order import Batch, Cursor, EpochOrder, fold_of, rank_slice
from offtower.data.read_ahead import ReadAhead
from offtower.data.rows import EncodedRows
from offtower.data.scanning import scan
from offtower.data.shared_windows import Contexts, Exchange, SharedLoader
from offtower.errors import ConfigError

__all__ = ["BatchReader", "Cursor", "Step", "row_folds", "scan"]

FoldOf = Callable[[EncodedRows], NDArray[np.int8]]


class _Step(NamedTuple):
    cursor: Cursor
    rows: EncodedRows
    fold: int


class Step(_Step):
    """One step of an epoch: (cursor, rows, fold).

    Attributes:
        cursor: the next batch.
        rows: this worker's rows of the batch.
        fold: fold of all rows of the batch; 0 without folds.
        first: position of this worker's first row in the batch.
        joined: rows of the batch over all workers, without context features.
    """

    first: int
    joined: EncodedRows

    def __new__(
        cls,
        cursor: Cursor,
        rows: EncodedRows,
        fold: int,
        first: int = 0,
        joined: EncodedRows | None = None,
    ) -> Step:
        step = super().__new__(cls, cursor, rows, fold)
        step.first = first
        step.joined = rows.without_context() if joined is None else joined
        return step

    @property
    def batch_rows(self) -> int:
        """Rows of the batch over all workers."""
        return len(self.joined)

    @property
    def batch_units(self) -> int:
        """Rounds of the batch in a log of slates, else its rows; over all workers."""
        rounds = self.joined.rounds
        return len(self.joined) if rounds is None else len(rounds)


@dataclass
class _Window:
    rows: EncodedRows
    """All rows of the window; without contexts where `contexts` has this worker's."""
    batches: list[Batch]
    contexts: Contexts | None = None

    def step(self, turn: int, cursor: Cursor, rank: int, world_size: int) -> Step:
        """The step of a batch."""
        batch = self.batches[turn]
        mine = batch.part(rank, world_size)
        rows = self.rows.take(batch.index[mine])
        if self.contexts is not None:
            rows = replace(rows, context=self.contexts.of(turn))
        joined = None if world_size == 1 else self.rows.without_context().take(batch.index)
        return Step(cursor, rows, batch.fold, mine.start, joined)


class BatchReader:
    """Reads epochs of a log in the order of an `EpochOrder`.

    A thread reads, checks and encodes the next window while the current one is consumed; at most
    two windows are in memory. A log of one window is encoded once and kept.

    Every worker takes its slice of each batch, so that the rows do not depend on the number of
    workers. With an `exchange` each reads its own row groups (`SharedLoader`); without one every
    worker reads every window.

    Args:
        loader: reads the log's row groups.
        order: made from the log's row group sizes.
        prefetch: False reads in the calling thread.
        fold: folds of encoded rows, (n,) int8; by default `row_folds` with the order's seed.
        cache_bytes: largest size of a log of one window that is kept.
        exchange: of the workers that read together.

    Raises:
        ConfigError: the order was made for another log.

    Use it as a context manager, or call `close`, to end the thread of an unfinished epoch.
    """

    def __init__(
        self,
        loader: Loader,
        order: EpochOrder,
        *,
        prefetch: bool = True,
        fold: FoldOf | None = None,
        cache_bytes: int = 2**29,
        exchange: Exchange | None = None,
    ) -> None:
        if not np.array_equal(order.row_group_sizes, loader.log.row_group_sizes):
            raise ConfigError("the order was made for another log: its row group sizes differ")
        self.order = order
        self.prefetch = prefetch
        self.seconds_waiting = 0.0
        """Seconds that the consumer has waited for windows, over all epochs."""
        self._loader = loader
        self._fold = fold
        self._cache_bytes = cache_bytes
        self._shared = None if exchange is None else SharedLoader(loader, exchange, cache_bytes)
        self._kept: EncodedRows | None = None
        self._kept_folds: NDArray[np.int8] | None = None
        self._running: weakref.WeakSet[Generator[Step, None, None]] = weakref.WeakSet()

    @property
    def bad_rows(self) -> int:
        """Rows in quarantine so far, each counted once."""
        return self._loader.bad_rows

    def epoch(
        self, epoch: int, start: Cursor | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Step]:
        """Iterate over the batches of an epoch, from `start` on.

        Args:
            epoch: number of the epoch.
            start: the cursor of an earlier `Step` of this epoch.
            rank: number of this worker.
            world_size: number of workers. All get the same number of steps; a batch with fewer rows
                than workers has no rows for some.

        Returns:
            Steps, which unpack into (next cursor, this worker's rows, fold).

        Raises:
            ConfigError: `start` is of another epoch, or rank is not in [0, world_size).
            BadRowsError: while iterating, without a quarantine.
        """
        start = start or Cursor(epoch, 0, 0)
        if start.epoch != epoch:
            raise ConfigError(f"a cursor of epoch {start.epoch} cannot start epoch {epoch}")
        rank_slice(0, rank, world_size)
        steps = self._epoch(start, rank, world_size)
        self._running.add(steps)
        return steps

    def close(self) -> None:
        """End the threads of unfinished epochs, and the exchange between workers."""
        for steps in list(self._running):
            steps.close()
        if self._shared is not None:
            self._shared.close()

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _epoch(self, start: Cursor, rank: int, world_size: int) -> Generator[Step, None, None]:
        epoch, first = start.epoch, start.batch
        with closing(self._windows(epoch, start.window)) as windows:
            for number in range(start.window, len(self.order.windows(epoch))):
                began = time.monotonic()
                window = next(windows)
                self.seconds_waiting += time.monotonic() - began
                last = len(window.batches)
                for turn in range(first, last):
                    cursor = (
                        Cursor(epoch, number, turn + 1)
                        if turn + 1 < last
                        else Cursor(epoch, number + 1, 0)
                    )
                    yield window.step(turn, cursor, rank, world_size)
                first = 0
                # Release the window, so that the thread can load the next one.
                del window

    def _windows(self, epoch: int, first: int) -> Generator[_Window, None, None]:
        windows = self.order.windows(epoch)
        numbers = range(first, len(windows))
        if len(windows) == 1 and self._kept is not None:
            for number in numbers:
                yield self._window(epoch, number, self._kept)
            return
        shared = self._shared
        tables = (shared or self._loader).tables(windows[first:])

        def load(number: int, stop: threading.Event) -> _Window | None:
            if shared is not None:
                return self._load_shared(shared, epoch, number, tables)
            rows = self._loader.load(windows[number], tables, stop)
            if rows is None:
                return None
            if len(windows) == 1 and rows.nbytes <= self._cache_bytes:
                self._kept = rows
            return self._window(epoch, number, rows)

        if not self.prefetch or len(numbers) < 2:
            with closing_tables(tables):
                for number in numbers:
                    window = load(number, threading.Event())
                    assert window is not None
                    yield window
                    del window
            return
        # The tables are closed first, since the thread may wait for them.
        with ReadAhead(numbers, load) as ahead, closing_tables(tables):
            yield from ahead

    def _load_shared(
        self, shared: SharedLoader, epoch: int, number: int, tables: Iterator[pa.Table]
    ) -> _Window:
        windows = self.order.windows(epoch)
        found = shared.load(windows[number], tables, may_be_whole=len(windows) == 1)
        if found.whole:
            self._kept = found.rows
            return self._window(epoch, number, found.rows)
        window = self._window(epoch, number, found.rows)
        window.contexts = shared.contexts(found, window.batches)
        return window

    def _window(self, epoch: int, number: int, rows: EncodedRows) -> _Window:
        folds = None
        if self.order.num_folds > 1:
            folds = self._folds(rows) if self._kept_folds is None else self._kept_folds
            if rows is self._kept:
                self._kept_folds = folds
        batches = self.order.batches(epoch, number, len(rows), folds, rows.rounds)
        return _Window(rows, batches)

    def _folds(self, rows: EncodedRows) -> NDArray[np.int8]:
        if self._fold is not None:
            return self._fold(rows)
        return row_folds(rows, self.order.num_folds, self.order.seed)


def row_folds(rows: EncodedRows, num_folds: int, seed: int) -> NDArray[np.int8]:
    """Assign (n,) folds: by user if the log has users, else by round or row number."""
    return fold_of(rows.unit_key, num_folds, seed)
