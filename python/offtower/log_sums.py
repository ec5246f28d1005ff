"""The pass over a catalogue and a training log that encodings and facts are fitted from, in parts.

A part is a run of consecutive rows. Sums of numbers are kept for each row group and added in the
order of the log, so that any number of workers gets the bits of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from offtower.data.catalogue import Catalogue
from offtower.data.check import RowChecker
from offtower.data.encoding_fit import EncodingPart, EncodingSums
from offtower.data.log import Log
from offtower.data.profile import UnitSample
from offtower.data.replay import ReplayLog
from offtower.data.row_sketch import RowSketch
from offtower.data.rows import row_weights
from offtower.data.schema import LogSchema
from offtower.models.items import DEFAULT_CHUNK
from offtower.progress import Progress


@dataclass(frozen=True)
class LogFacts:
    """Facts from one pass over the training log."""

    rows: int
    binary_reward: bool
    mean_reward: float
    smallest_pscore: float | None
    mean_row_weight: float = 1.0
    """Of the rows' weights; 1 where they have none."""
    row_sketch: dict[str, str] | None = None
    """`RowSketch.to_dict` of the rows, and of those of the runs before, by which copies of them are
    found in other logs."""
    profile: dict[str, Any] | None = None
    """`LogProfile.to_dict` of the rows, with which `offtower monitor` compares later logs."""


@dataclass(frozen=True)
class TableFacts:
    """Of the good rows of one row group."""

    rows: int
    reward: float
    """Sum of the weighted rewards."""
    weight: float
    binary: bool
    smallest_pscore: float

    @classmethod
    def of(cls, table: pa.Table, schema: LogSchema) -> TableFacts:
        reward = table.column(schema.reward).to_numpy().astype(np.float64)
        weight = row_weights(table, schema)
        smallest = np.inf
        if schema.pscore is not None:
            smallest = float(table.column(schema.pscore).to_numpy().min(initial=np.inf))
        return cls(
            len(reward),
            float(reward.sum() if weight is None else weight @ reward),
            float(len(reward) if weight is None else weight.sum()),
            bool(np.isin(reward, (0.0, 1.0)).all()),
            smallest,
        )


@dataclass(frozen=True)
class LogPart:
    """What a pass over some row groups finds out."""

    contexts: EncodingPart
    tables: list[TableFacts]
    sketch: RowSketch
    sample: UnitSample


@dataclass(frozen=True)
class FittingPart:
    """Of one worker."""

    items: EncodingPart
    log: LogPart


@dataclass(frozen=True)
class LogSums:
    """Sums over a whole log."""

    contexts: EncodingSums
    tables: list[TableFacts]
    sketch: RowSketch
    sample: UnitSample

    @classmethod
    def of_parts(cls, schema: LogSchema, parts: Sequence[LogPart]) -> LogSums:
        """Add up parts in the order of the log.

        Raises:
            DataError: as `EncodingSums.of_parts`.
        """
        sketch, sample = parts[0].sketch, parts[0].sample
        for part in parts[1:]:
            sketch, sample = sketch.merge(part.sketch), sample.merge(part.sample)
        contexts = EncodingSums.of_parts(schema.context, [part.contexts for part in parts])
        return cls(contexts, [table for part in parts for table in part.tables], sketch, sample)

    def facts(self, earlier: RowSketch | None = None) -> LogFacts:
        """Facts about the rows. earlier: sketch of what the runs before were trained on."""
        sketch = self.sketch if earlier is None else self.sketch.merge(earlier)
        rows, reward, weight = 0, 0.0, 0.0
        for table in self.tables:
            rows, reward, weight = rows + table.rows, reward + table.reward, weight + table.weight
        smallest = min((table.smallest_pscore for table in self.tables), default=np.inf)
        return LogFacts(
            rows=rows,
            binary_reward=all(table.binary for table in self.tables),
            mean_reward=reward / (weight or 1.0),
            mean_row_weight=weight / rows if rows else 1.0,
            smallest_pscore=None if np.isinf(smallest) else smallest,
            row_sketch=sketch.to_dict(),
            profile=self.sample.profile().to_dict(),
        )


def item_part(catalogue: Catalogue, worker: tuple[int, int] = (0, 1)) -> EncodingPart:
    """Read the r-th of R runs of items, of whole chunks; `worker` is r and R."""
    n = catalogue.num_items
    starts = range(0, n, DEFAULT_CHUNK)
    rank, size = worker
    mine = starts[len(starts) * rank // size : len(starts) * (rank + 1) // size]
    tables = (catalogue.table(start, min(start + DEFAULT_CHUNK, n)) for start in mine)
    return EncodingPart.of(catalogue.schema.features, tables, None)


def log_part(
    log: Log,
    catalogue: Catalogue,
    quarantine: Path | None,
    progress: Progress,
    worker: tuple[int, int] = (0, 1),
) -> LogPart:
    """Read the r-th of R runs of row groups, of about as many rows each; `worker` is r and R.

    Raises:
        BadRowsError, DataError: of the first bad row of the run.
    """
    rank, size = worker
    ends = np.cumsum(log.row_group_sizes)
    total = int(ends[-1]) if len(ends) else 0
    edges = np.searchsorted(ends, [total * one // size for one in range(size)], "right").tolist()
    first, last = [0, *edges[1:], len(ends)][rank : rank + 2]
    groups = range(first, last)
    checker = RowChecker(
        log.schema, catalogue, quarantine=None if quarantine is None else quarantine / "train"
    )
    found = _Pass(log.schema)
    progress.start("reading the log", int(log.row_group_sizes[first:last].sum()))
    contexts = EncodingPart.of(
        log.schema.context,
        found.watch(log, groups, _checked(log, groups, checker, progress)),
        log.schema.timestamp,
    )
    progress.finish()
    return LogPart(contexts, found.tables, found.sketch, found.sample)


def _checked(
    log: Log, groups: range, checker: RowChecker, progress: Progress
) -> Iterator[pa.Table]:
    first_row = int(log.row_group_sizes[: groups.start].sum())
    for group, read in zip(groups, log.read_row_groups(groups), strict=True):
        table = checker.check(read, log.location(group), first_row)
        del read
        first_row += int(log.row_group_sizes[group])
        yield table
        progress.advance(int(log.row_group_sizes[group]))


class _Pass:
    """Collects what is known of the rows beside the sums of encodings."""

    def __init__(self, schema: LogSchema) -> None:
        self._schema = schema
        self.tables: list[TableFacts] = []
        self.sketch = RowSketch.empty()
        self.sample = UnitSample(schema.context)

    def watch(self, log: Log, groups: range, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Yield the tables of a log's own rows; replayed ones are only counted."""
        own = log.own_groups if isinstance(log, ReplayLog) else len(log.row_group_sizes)
        before = np.cumsum(log.row_group_sizes) - log.row_group_sizes
        for group, table in zip(groups, tables, strict=True):
            self.tables.append(TableFacts.of(table, self._schema))
            self.sketch = self.sketch.with_rows(table, self._schema)
            number = np.arange(before[group], before[group] + table.num_rows)
            self.sample = self.sample.with_rows(table, self._schema, number)
            if group < own:
                yield table
