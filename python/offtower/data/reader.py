"""Batches of encoded rows from a log, read ahead by a thread, in a resumable order."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.encoding import FeatureEncoding
from offtower.data.loading import Loader, closing_tables, concat_rows
from offtower.data.location import AnyPath
from offtower.data.log import Log
from offtower.data.order import Batch, Cursor, EpochOrder, fold_of, rank_slice
from offtower.data.read_ahead import ReadAhead
from offtower.data.rows import EncodedRows
from offtower.data.shared_windows import Contexts, Exchange, SharedLoader
from offtower.errors import ConfigError

__all__ = ["BatchReader", "Cursor", "Step", "row_folds", "scan"]

FoldOf = Callable[[EncodedRows], NDArray[np.int8]]

_SCAN_WINDOW_ROWS = 131_072


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


def scan(
    log: Log,
    catalogue: Catalogue,
    context_encoding: FeatureEncoding,
    batch_rows: int,
    *,
    rows: range | None = None,
    quarantine: AnyPath | None = None,
    prefetch: bool = True,
    sketched: bool = False,
) -> Iterator[EncodedRows]:
    """Iterate over all rows of a log in file order, `batch_rows` at a time.

    Rounds of slates stay whole: batch b has the rounds that begin with rows b * batch_rows to
    (b + 1) * batch_rows - 1, and batches in which no round begins are left out.

    Args:
        rows: numbers of the rows to read, all by default. If they start and stop at multiples of
            `batch_rows`, batches are those of the whole log.
        quarantine: folder for bad rows, which are left out.
        sketched: also hash the rows' contents.

    Raises:
        ConfigError: `batch_rows` is less than 1, or `rows` is given with a quarantine.
        BadRowsError: while iterating, without a quarantine.
    """
    if rows is not None and quarantine is not None:
        raise ConfigError("a range of rows can only be read without a quarantine")
    loader = Loader(log, catalogue, context_encoding, quarantine, sketched=sketched)
    rows = range(log.num_rows) if rows is None else rows
    first = log.first_rows
    groups = range(
        max(0, int(np.searchsorted(first, rows.start, side="right")) - 1),
        int(np.searchsorted(first, rows.stop, side="left")),
    )
    order = EpochOrder(
        log.row_group_sizes[groups.start : groups.stop],
        batch_rows,
        0,
        shuffle=False,
        window_rows=_SCAN_WINDOW_ROWS,
    )
    windows = [[groups.start + int(g) for g in window] for window in order.windows(0)]
    if log.schema.slates:
        return _by_rounds(_loaded(loader, windows, prefetch), batch_rows, rows)
    if quarantine is not None:
        return _scan(loader, windows, batch_rows, prefetch)
    before = rows.start - int(first[groups.start])
    return _scan(loader, windows, batch_rows, prefetch, before, len(rows))


def _scan(
    loader: Loader,
    windows: list[list[int]],
    batch_rows: int,
    prefetch: bool,
    skip: int = 0,
    limit: int | None = None,
) -> Iterator[EncodedRows]:
    """Iterate over rows of some windows, without the first `skip`, at most `limit`."""
    rest: EncodedRows | None = None
    with closing(_loaded(loader, windows, prefetch)) as loaded:
        for rows in loaded:
            if skip or (limit is not None and len(rows) > limit):
                stop = len(rows) if limit is None else min(len(rows), skip + limit)
                rows = rows.take(np.arange(min(skip, stop), stop))
                skip = 0
            if limit is not None:
                limit -= len(rows)
            if rest is not None:
                rows = concat_rows([rest, rows])
            whole = len(rows) - len(rows) % batch_rows
            for start in range(0, whole, batch_rows):
                yield rows.take(np.arange(start, start + batch_rows))
            rest = rows.take(np.arange(whole, len(rows))) if whole < len(rows) else None
            del rows
    if rest is not None:
        yield rest


def _loaded(
    loader: Loader, windows: list[list[int]], prefetch: bool
) -> Generator[EncodedRows, None, None]:
    """Iterate over the rows of windows, the next one read ahead by a thread."""
    numbers = range(len(windows))
    with ExitStack() as stack:
        loaded: Iterator[EncodedRows | None]
        tables = loader.tables(windows)
        if prefetch and len(windows) > 1:
            ahead = ReadAhead(
                numbers, lambda number, stop: loader.load(windows[number], tables, stop)
            )
            loaded = iter(stack.enter_context(ahead))
        else:
            loaded = (loader.load(groups, tables, threading.Event()) for groups in windows)
        stack.enter_context(closing_tables(tables))
        for rows in loaded:
            assert rows is not None
            yield rows
            del rows


def _by_rounds(
    loaded: Generator[EncodedRows, None, None], batch_rows: int, wanted: range
) -> Iterator[EncodedRows]:
    """Iterate over the rounds that begin in `wanted`, by batch."""
    rest: EncodedRows | None = None
    with closing(loaded):
        for rows in loaded:
            if rest is not None:
                rows = concat_rows([rest, rows])
            rounds = rows.rounds
            assert rounds is not None, "callers have a log of slates"
            begin = rows.row[rounds.first]
            edges = np.flatnonzero(np.diff(begin // batch_rows, prepend=-1))
            for start, stop in pairwise([*edges.tolist(), len(rounds)]):
                batch = range(int(rounds.offsets[start]), int(rounds.offsets[stop]))
                if begin[start] < wanted.start or begin[start] >= wanted.stop:
                    rest = None
                    continue
                rest = rows.take(np.arange(batch.start, batch.stop))
                if stop < len(rounds):
                    yield rest
            del rows
    if rest is not None:
        yield rest
