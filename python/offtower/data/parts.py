"""Writing of logs by many workers, with the same bytes as by one.

Rows come in units (row groups of a log, files of a source, chunks of a simulation). With known
numbers of rows per unit, each file is a function of its number: the rows from number *
rows_per_file on of all units. A file that is written twice is the same.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.atomic import remove_leftovers
from offtower.data.location import AnyPath, Location
from offtower.data.log import ROWS_PER_FILE, ROWS_PER_GROUP, finish_log, regroup, write_log_file
from offtower.data.output import check_new, new_directory
from offtower.data.parquet import Footer
from offtower.data.round_tables import rounds_between
from offtower.data.schema import LogSchema
from offtower.errors import DataError
from offtower.execution import Execution
from offtower.progress import report_rows


class RowSource(ABC):
    """A source of rows in units; pickled for workers, so it holds no rows."""

    counts: NDArray[np.int64]
    """(u,) rows of each unit."""

    @abstractmethod
    def tables(self, unit: int) -> Iterator[pa.Table]:
        """Read the rows of a unit, in order; the same at every call."""

    def rows(self, first: int, last: int) -> Iterator[pa.Table]:
        """Read rows first..last-1 of all units; other units are not read."""
        ends = np.cumsum(self.counts)
        unit = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            at = int(ends[unit] - self.counts[unit])
            for table in self.tables(unit):
                start, stop = max(first, at), min(last, at + table.num_rows)
                if start < stop:
                    yield table.slice(start - at, stop - start)
                at += table.num_rows
                if at >= last:
                    break
            first = min(last, int(ends[unit]))
            unit += 1


@dataclass(frozen=True)
class _Written:
    rows: int
    footer: Footer | None
    """None where no round begins in the file's rows."""


def write_log_parts(
    directory: AnyPath,
    source: RowSource,
    schema: LogSchema,
    execution: Execution,
    *,
    rows_per_group: int = ROWS_PER_GROUP,
    rows_per_file: int = ROWS_PER_FILE,
    task: str = "writing",
) -> dict[str, Any]:
    """Write a source as `write_log` would, a file at a time, in parts.

    Returns:
        The manifest: schema, num_rows, fingerprint.

    Raises:
        DataError: the directory exists, a column is missing, or there are no rows.
    """
    directory = Location.of(directory)
    mapper, progress = execution.mapper, execution.progress
    check_new(directory)
    total = int(source.counts.sum())
    if total == 0:
        raise DataError(f"no rows to write to '{directory}'")
    rows_per_file = max(1, rows_per_file // rows_per_group) * rows_per_group
    with new_directory(directory) as temporary:
        # Absolute, since workers have another working folder.
        sizes = (rows_per_group, rows_per_file)
        write = partial(_write, source, schema, temporary.absolute(), sizes)
        progress.start(task, total)
        numbers = range(-(-total // rows_per_file))
        written = list(report_rows(mapper.map(write, numbers, task), progress))
        progress.finish()
        if temporary.local is not None:
            remove_leftovers(temporary.local)
        footers = [one.footer for one in written if one.footer is not None]
        return finish_log(temporary, schema, footers)


def _write(
    source: RowSource, schema: LogSchema, directory: Location, sizes: tuple[int, int], number: int
) -> _Written:
    rows_per_group, rows_per_file = sizes
    total = int(source.counts.sum())
    first = number * rows_per_file
    last = min(first + rows_per_file, total)
    if not schema.slates:
        groups = regroup(source.rows(first, last), rows_per_group, schema, first)
        return _Written(last - first, write_log_file(directory, number, groups))
    rounds = rounds_between(source.rows(first, total), schema, first, last)
    begin = next(rounds, None)
    if begin is None:  # The last rounds began in the file before.
        return _Written(last - first, None)
    at, table = begin
    tables = itertools.chain([table], (later for _, later in rounds))
    groups = regroup(tables, rows_per_group, schema, at)
    return _Written(last - first, write_log_file(directory, number, groups))
