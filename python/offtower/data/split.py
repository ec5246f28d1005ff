"""Split a log by time, user, round or row, streaming from and to files."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import hashed
from offtower.data.location import AnyPath, Location
from offtower.data.log import Log, ParquetLog
from offtower.data.order import keyed_hash
from offtower.data.output import check_new
from offtower.data.parts import RowSource, write_log_parts
from offtower.data.round_tables import table_rounds
from offtower.data.schema import LogSchema
from offtower.errors import DataError
from offtower.execution import LOCAL, Execution
from offtower.mapping import Mapper, pieces

SplitBy = Literal["time", "user", "round", "row"]

_BINS = 65_536

Assign = Callable[[pa.Table, int], NDArray[np.int64]]
"""Maps a table and the number of its first row in the log to the part of each row."""


def split_log(
    log: Log | AnyPath,
    out: AnyPath,
    by: SplitBy = "time",
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    names: Sequence[str] = ("train", "validation", "test"),
    seed: int = 0,
    *,
    execution: Execution = LOCAL,
) -> dict[str, int]:
    """Write each part of a log to `out`/<name>, keeping the order of rows and all columns.

    Memory is bounded: rows are read a row group at a time.

    Args:
        log: the log, or the directory of one.
        out: folder of the parts; it may exist, the parts may not.
        by: "time" cuts at quantiles of the timestamp, so that later rows are for testing (rows of
            equal times stay together); "user" and "round" assign users or rounds by a keyed hash;
            "row" assigns single rows.
        fractions: of each part; their sum is 1.
        names: name of each part.
        seed: key of the hash; another seed draws another split.
        execution: reads row groups and writes files; the files are the same with any.

    Returns:
        Rows of each part, by name.

    Raises:
        DataError: the log lacks the column, a part exists or would be empty, or the fractions do
            not add up to 1. Nothing is left behind.
    """
    if not isinstance(log, Log):
        log = ParquetLog.open(log)
    _check_parts(fractions, names)
    out = Location.of(out)
    for name in names:
        check_new(out / name)
    mapper = execution.mapper
    assign = _assignment(log, by, np.cumsum(fractions)[:-1], seed, mapper)
    counts = _count(log, assign, len(names), mapper)
    totals = counts.sum(axis=0)
    if not totals.all():
        empty = names[int(totals.argmin())]
        raise DataError(
            f"part '{empty}' would be empty: {log.num_rows} rows split by {by} "
            f"into {', '.join(f'{c} {n}' for n, c in zip(names, totals, strict=True))}"
        )
    columns = _all_columns(log)
    with _together(out, names) as folder:
        for number, name in enumerate(names):
            source = _Part(log, columns, assign, number, counts[:, number])
            write_log_parts(folder / name, source, log.schema, execution, task=f"writing {name}")
    return {name: int(count) for name, count in zip(names, totals, strict=True)}


@contextmanager
def _together(out: Location, names: Sequence[str]) -> Iterator[Location]:
    """Yield where to write the parts; they appear in `out` at the end. In a store one by one, and
    if the block fails those that are there go again."""
    if out.local is None:
        try:
            yield out
        except BaseException:
            with contextlib.suppress(Exception):
                for name in names:
                    (out / name).remove()
            raise
        return
    place = out.local
    created = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".split-", dir=place))
    try:
        yield Location.of(temporary)
        for name in names:
            os.rename(temporary / name, place / name)
        temporary.rmdir()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if created and not any(place.iterdir()):
            place.rmdir()
        raise


def _check_parts(fractions: Sequence[float], names: Sequence[str]) -> None:
    if len(fractions) != len(names) or not names:
        raise DataError(f"{len(fractions)} fractions do not fit {len(names)} names")
    if not all(f > 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-9:
        raise DataError(f"fractions must be positive and add up to 1, but are {tuple(fractions)}")
    if len(set(names)) != len(names):
        raise DataError(f"names of parts must differ, but are {', '.join(names)}")
    for name in names:
        if not name or name.startswith(".") or Path(name).name != name:
            raise DataError(
                f"'{name}' cannot be the name of a part: it must be a plain folder name"
            )


def _pieces(log: Log, mapper: Mapper) -> list[range]:
    """Return ranges of row groups of about a million rows."""
    sizes = log.row_group_sizes
    return pieces(len(sizes), max(1, round(1_000_000 / sizes.mean())), mapper.workers)


def _tables(
    log: Log, columns: Sequence[str], groups: Iterable[int]
) -> Iterator[tuple[pa.Table, int]]:
    first_rows, groups = log.first_rows, list(groups)
    for group, table in zip(groups, log.read_row_groups(groups, columns), strict=True):
        yield table, int(first_rows[group])


def _all_columns(log: Log) -> list[str]:
    """Return the schema's columns, and others that all files have with the same type."""
    if not isinstance(log, ParquetLog):
        names: list[str] = log.read_row_group(0).column_names
        return names
    schemas = [footer.columns for footer in log.footers()]
    return [
        field.name
        for field in schemas[0]
        if field.name in log.schema.columns
        or (
            all(other.names.count(field.name) == 1 for other in schemas)
            and len({other.field(field.name).type for other in schemas}) == 1
        )
    ]


class _Part(RowSource):
    """The rows of one part; a unit is a row group."""

    def __init__(
        self,
        log: Log,
        columns: Sequence[str],
        assign: Assign,
        part: int,
        counts: NDArray[np.int64],
    ) -> None:
        self._log, self._columns, self._assign, self._part = log, columns, assign, part
        self.counts = counts

    def tables(self, unit: int) -> Iterator[pa.Table]:
        for table, first_row in _tables(self._log, self._columns, [unit]):
            assigned = _assigned(self._log.schema, self._assign, table, first_row)
            yield table.filter(pa.array(assigned == self._part))


def _count(log: Log, assign: Assign, parts: int, mapper: Mapper) -> NDArray[np.int64]:
    """Count the rows by row group and part."""
    schema = log.schema
    names = (schema.timestamp, schema.user_id, schema.round_id, schema.position)
    wanted = [name for name in names if name is not None]
    count = partial(_count_groups, log, wanted or [schema.action], assign, parts)
    return np.concatenate(list(mapper.map(count, _pieces(log, mapper), "counting")))


def _count_groups(
    log: Log, columns: Sequence[str], assign: Assign, parts: int, groups: range
) -> NDArray[np.int64]:
    return np.stack(
        [
            np.bincount(_assigned(log.schema, assign, table, first_row), minlength=parts)
            for table, first_row in _tables(log, columns, groups)
        ]
    )


def _assigned(
    schema: LogSchema, assign: Assign, table: pa.Table, first_row: int
) -> NDArray[np.int64]:
    """(n,) part of each row; a round of slates goes where its first row goes."""
    part = assign(table, first_row)
    if not schema.slates:
        return part
    rounds = table_rounds(table, schema)
    return np.repeat(part[rounds.first], rounds.lengths)


@dataclass(frozen=True)
class _ByRow:
    """Assigns single rows; the hashes of part k are below bounds[k]."""

    bounds: NDArray[np.uint64]
    seed: int

    def __call__(self, table: pa.Table, first_row: int) -> NDArray[np.int64]:
        rows = np.arange(first_row, first_row + table.num_rows)
        return np.searchsorted(self.bounds, keyed_hash(rows, self.seed), side="right")


@dataclass(frozen=True)
class _ByKey:
    """Assigns rows with equal values of a column to the same part."""

    column: str
    bounds: NDArray[np.uint64]
    seed: int

    def __call__(self, table: pa.Table, first_row: int) -> NDArray[np.int64]:
        key = keyed_hash(_keys(table, self.column), self.seed)
        return np.searchsorted(self.bounds, key, side="right")


@dataclass(frozen=True)
class _ByTime:
    """Assigns rows by their interval between cuts."""

    column: str
    cuts: NDArray[np.uint64]

    def __call__(self, table: pa.Table, first_row: int) -> NDArray[np.int64]:
        return np.searchsorted(self.cuts, _sortable(table, self.column), side="right")


def _assignment(
    log: Log, by: str, shares: NDArray[np.float64], seed: int, mapper: Mapper
) -> Assign:
    schema = log.schema
    bounds = np.array([min(int(share * 2**64), 2**64 - 1) for share in shares], dtype=np.uint64)
    if by == "row":
        return _ByRow(bounds, seed)
    columns = {"time": schema.timestamp, "user": schema.user_id, "round": schema.round_id}
    if by not in columns:
        raise DataError(f"a log is split by time, user, round or row, not by '{by}'")
    column = columns[by]
    if column is None:
        field = {"time": "timestamp", "user": "user_id", "round": "round_id"}[by]
        raise DataError(f"to split by {by} the log's schema must name its {field} column")
    if by == "time":
        return _ByTime(column, _quantiles(log, column, shares, mapper))
    return _ByKey(column, bounds, seed)


def _keys(table: pa.Table, column: str) -> NDArray[np.uint64]:
    values = table.column(column)
    if values.null_count:
        raise DataError(f"column '{column}' has nulls; a split by it needs every row's value")
    return hashed(values)


def _quantiles(
    log: Log, column: str, shares: NDArray[np.float64], mapper: Mapper
) -> NDArray[np.uint64]:
    """Find exact quantiles of a column in at most five passes of bounded memory.

    Each pass counts the values in 65,536 bins of each quantile's interval and narrows the interval
    to one bin.
    """
    parts = _pieces(log, mapper)
    found = list(mapper.map(partial(_extent, log, column), parts, "finding times"))
    low, high = min(one[0] for one in found), max(one[1] for one in found)
    total = sum(one[2] for one in found)
    ranks = [min(round(share * total), total - 1) for share in shares]
    intervals = [(low, high, 0) for _ in ranks]  # first value, last value, rows below the first
    while any(first < last for first, last, _ in intervals):
        widths = [(last - first) // _BINS + 1 for first, last, _ in intervals]
        counts = np.zeros((len(ranks), _BINS), dtype=np.int64)
        bins = partial(_count_bins, log, column, intervals, widths)
        for part in mapper.map(bins, parts, "finding quantiles"):
            counts += part
        for k, (first, last, below) in enumerate(intervals):
            cumulative = below + np.cumsum(counts[k])
            bin_number = int(np.searchsorted(cumulative, ranks[k], side="right"))
            start = first + bin_number * widths[k]
            before = below if bin_number == 0 else int(cumulative[bin_number - 1])
            intervals[k] = (start, min(start + widths[k] - 1, last), before)
    return np.array([first for first, _, _ in intervals], dtype=np.uint64)


def _extent(log: Log, column: str, groups: range) -> tuple[int, int, int]:
    """Return the smallest and largest value of some row groups, and the number of rows."""
    low, high, rows = 2**64 - 1, 0, 0
    for table, _ in _tables(log, [column], groups):
        if table.num_rows:
            values = _sortable(table, column)
            low, high = min(low, int(values.min())), max(high, int(values.max()))
            rows += values.size
    return low, high, rows


def _count_bins(
    log: Log,
    column: str,
    intervals: Sequence[tuple[int, int, int]],
    widths: Sequence[int],
    groups: range,
) -> NDArray[np.int64]:
    """Count the values of some row groups: (intervals, bins)."""
    counts = np.zeros((len(intervals), _BINS), dtype=np.int64)
    for table, _ in _tables(log, [column], groups):
        values = _sortable(table, column)
        for k, (first, last, _) in enumerate(intervals):
            inside = values[(values >= np.uint64(first)) & (values <= np.uint64(last))]
            bins = (inside - np.uint64(first)) // np.uint64(widths[k])
            counts[k] += np.bincount(bins.astype(np.int64), minlength=_BINS)
    return counts


def _sortable(table: pa.Table, column: str) -> NDArray[np.uint64]:
    """Convert times to unsigned integers in the same order (timestamps: microseconds)."""
    values = table.column(column)
    if values.null_count:
        raise DataError(f"column '{column}' has nulls; a split by time needs every row's time")
    kind = values.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        values = values.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    elif pa.types.is_floating(kind):
        numbers = values.cast(pa.float64()).to_numpy()
        if np.isnan(numbers).any():
            raise DataError(f"column '{column}' has NaN; a split by time needs every row's time")
        bits = (numbers + 0.0).view(np.int64)  # + 0.0 turns -0.0 into 0.0
        signed = np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)
        return _ordered_bits(signed)
    elif not pa.types.is_integer(kind):
        raise DataError(f"column '{column}' of type {kind} holds no times; cast it to a timestamp")
    return _ordered_bits(pc.cast(values, pa.int64()).to_numpy())


def _ordered_bits(integers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Unsigned integers in the order of the signed ones."""
    bits: NDArray[np.uint64] = integers.view(np.uint64)
    return bits ^ np.uint64(2**63)
