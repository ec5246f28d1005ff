"""Windows of a log that several workers read together.

Each worker reads and encodes its own row groups, about 1/R of the log. The workers exchange two
things per window: all rows without their contexts, which every worker needs to cut the batches
and for actions, rewards and propensities of whole batches; and the contexts, each of which goes to
the worker whose slice of a batch its row is in. The order of rows does not depend on R.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.features import FeatureArrays, take
from offtower.data.loading import Loader
from offtower.data.order import Batch
from offtower.data.row_batches import from_batch, to_batch
from offtower.data.rows import EncodedRows

Value = TypeVar("Value")


class Exchange(Protocol):
    """Messages between the reading threads of all workers; every method is collective."""

    rank: int
    size: int

    def gather_objects(self, value: Value) -> list[Value]:
        """Small objects of all workers, in the order of ranks."""

    def all_to_all(self, parts: Sequence[memoryview]) -> list[memoryview]:
        """Send part d to worker d; return what each worker sent here."""

    def close(self) -> None:
        """Free the connections; not collective, and called when nothing is under way."""


@dataclass(frozen=True)
class Contexts:
    """Contexts of one worker's rows of all batches of a window.

    Attributes:
        features: of the rows, in the order of their arrival.
        index: (m,) positions of the batches' rows in `features`, one batch after the other.
        ends: first row of each batch in `index`, and the number of rows.
    """

    features: FeatureArrays
    index: NDArray[np.int64]
    ends: NDArray[np.int64]

    def of(self, turn: int) -> FeatureArrays:
        """Contexts of this worker's rows of a batch."""
        return take(self.features, self.index[self.ends[turn] : self.ends[turn + 1]])


@dataclass(frozen=True)
class SharedRows:
    """The rows of a window and those among them that this worker has read.

    Attributes:
        rows: all rows, without contexts; with them where `whole`.
        owner: (n,) worker that has read each row.
        mine: rows that this worker has read, with contexts.
        whole: whether every worker has all contexts.
    """

    rows: EncodedRows
    owner: NDArray[np.int64]
    mine: EncodedRows | None
    whole: bool


class SharedLoader:
    """Loads windows together with other workers.

    Args:
        loader: reads this worker's row groups.
        exchange: of the workers.
        whole_bytes: windows up to this size are sent whole to every worker where `load` may.
    """

    def __init__(self, loader: Loader, exchange: Exchange, whole_bytes: int) -> None:
        self._loader, self._exchange, self._whole_bytes = loader, exchange, whole_bytes

    def close(self) -> None:
        """Free the connections of the exchange."""
        self._exchange.close()

    def owner(self, group: int) -> int:
        """The worker that reads a row group: the same in every epoch, so that it can keep it."""
        return group % self._exchange.size

    def tables(self, windows: Sequence[Sequence[int]]) -> Iterator[pa.Table]:
        """Read this worker's row groups of some windows, for `load`."""
        return self._loader.tables([self._owned(window) for window in windows])

    def load(
        self, groups: Sequence[int], tables: Iterator[pa.Table], *, may_be_whole: bool
    ) -> SharedRows:
        """Load a window; collective.

        Raises:
            OfftowerError: of the first row group, in the order of the log, that a worker could not
                load; the same on every worker.
        """
        own = self._owned(groups)
        mine, lengths, fault = self._read(own, tables)
        size = 0 if mine is None else mine.nbytes
        found = self._exchange.gather_objects((lengths, size, fault))
        faults = {one[0]: one[1] for _, _, one in found if one is not None}
        if faults:
            raise faults[min(faults)]
        whole = may_be_whole and sum(size for _, size, _ in found) <= self._whole_bytes
        rows_of = {group: n for one, _, _ in found for group, n in one.items()}
        parts = self._all(mine, whole=whole)
        joined = EncodedRows.concat(parts) if len(parts) > 1 else parts[0]
        # Rows came by worker; positions of each row group in what came, and then in file order.
        sizes = np.array([rows_of[group] for group in groups], dtype=np.int64)
        owners = np.array([self.owner(group) for group in groups], dtype=np.int64)
        by_owner = np.argsort(owners, kind="stable")
        starts = np.empty(len(groups), dtype=np.int64)
        starts[by_owner] = np.concatenate([[0], np.cumsum(sizes[by_owner])[:-1]])
        index = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        return SharedRows(joined.take(index), np.repeat(owners, sizes), mine, whole)

    def contexts(self, shared: SharedRows, batches: Sequence[Batch]) -> Contexts:
        """Exchange the contexts of a window's rows; collective."""
        exchange, owner = self._exchange, shared.owner
        needed = [
            _joined([batch.index[batch.part(rank, exchange.size)] for batch in batches])
            for rank in range(exchange.size)
        ]
        # Positions among the rows that this worker has read.
        local = np.cumsum(owner == exchange.rank) - 1
        parts = []
        for rows in needed:
            index = local[rows[owner[rows] == exchange.rank]]
            parts.append(_packed(None if shared.mine is None else _context(shared.mine, index)))
        features = self._unpacked(exchange.all_to_all(parts))
        mine = needed[exchange.rank]
        order = np.argsort(owner[mine], kind="stable")
        index = np.empty(mine.size, dtype=np.int64)
        index[order] = np.arange(mine.size)
        sizes = [batch.part(exchange.rank, exchange.size) for batch in batches]
        ends = np.cumsum([0] + [part.stop - part.start for part in sizes])
        return Contexts(EncodedRows.concat(features).context, index, ends)

    def _owned(self, groups: Sequence[int]) -> list[int]:
        return [group for group in groups if self.owner(group) == self._exchange.rank]

    def _read(
        self, groups: Sequence[int], tables: Iterator[pa.Table]
    ) -> tuple[EncodedRows | None, dict[int, int], tuple[int, Exception] | None]:
        """Rows of this worker's row groups, their numbers, and the first error with its group."""
        parts: list[EncodedRows] = []
        lengths: dict[int, int] = {}
        # A window is loaded to its end, since the other workers wait for it.
        never = threading.Event()
        for group in groups:
            try:
                part = self._loader.load([group], tables, never)
            except Exception as error:
                return None, lengths, (group, error)
            assert part is not None
            parts.append(part)
            lengths[group] = len(part)
        return (EncodedRows.concat(parts) if parts else None), lengths, None

    def _all(self, mine: EncodedRows | None, *, whole: bool) -> list[EncodedRows]:
        """Rows of all workers that have any, in the order of ranks."""
        sent = mine if mine is None or whole else mine.without_context()
        return self._unpacked(self._exchange.all_to_all([_packed(sent)] * self._exchange.size))

    def _unpacked(self, messages: Sequence[memoryview]) -> list[EncodedRows]:
        log, items = self._loader.log, self._loader.eligible
        kind = log.schema.pscore_kind if log.schema.slates else None
        return [
            from_batch(pa.ipc.open_stream(message).read_next_batch(), items, kind)
            for message in messages
            if len(message)
        ]


def _context(rows: EncodedRows, index: NDArray[np.int64]) -> EncodedRows:
    """Rows of which only the contexts are of interest."""
    return replace(rows.without_context().take(index[:0]), context=take(rows.context, index))


def _packed(rows: EncodedRows | None) -> memoryview:
    if rows is None:
        return memoryview(b"")
    batch, sink = to_batch(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def _joined(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
