"""All rows of a log in file order, encoded, in batches."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from itertools import pairwise

import numpy as np

from offtower.data.catalogue import Catalogue
from offtower.data.encoding import FeatureEncoding
from offtower.data.loading import Loader, closing_tables, concat_rows
from offtower.data.location import AnyPath
from offtower.data.log import Log
from offtower.data.order import EpochOrder
from offtower.data.read_ahead import ReadAhead
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError

_SCAN_WINDOW_ROWS = 131_072


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
