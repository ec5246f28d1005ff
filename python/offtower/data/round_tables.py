"""Tables of a log of slates: its rounds, their faults, and cuts that keep rounds whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import Column, as_array, as_float_array, is_list, list_parts, splitmix64
from offtower.data.rounds import Rounds, cut_before, key_starts
from offtower.data.schema import LogSchema
from offtower.errors import DataError

if TYPE_CHECKING:
    from offtower.data.log import TableOrigin

Mask = NDArray[np.bool_]
MAX_POSITIONS = 4096
"""Rows of the longest round."""


def round_starts(table: pa.Table, schema: LogSchema) -> Mask:
    """(n,) whether a row has another round_id than the row before it."""
    assert schema.round_id is not None, "a log of slates has round ids"
    return key_starts(codes(table.column(schema.round_id)))


def table_rounds(table: pa.Table, schema: LogSchema) -> Rounds:
    """Runs of equal round ids."""
    starts = np.flatnonzero(round_starts(table, schema))
    return Rounds(np.append(starts, table.num_rows).astype(np.int64))


def position_order(table: pa.Table, schema: LogSchema) -> NDArray[np.int64] | None:
    """(n,) order that puts the rows of each round by position; None if they are."""
    rounds, position = table_rounds(table, schema), positions(table, schema)
    if np.array_equal(position, rounds.position):
        return None
    return np.lexsort((position, rounds.number))


def ordered(table: pa.Table, schema: LogSchema) -> pa.Table:
    """The table with the rows of each round in the order of their positions."""
    order = position_order(table, schema) if schema.slates else None
    return table if order is None else table.take(pa.array(order))


def positions(table: pa.Table, schema: LogSchema) -> NDArray[np.int64]:
    """(n,) positions; null is -1."""
    column = pc.cast(pc.fill_null(as_array(table.column(schema.position)), -1), pa.int64())
    found: NDArray[np.int64] = column.to_numpy(zero_copy_only=False)
    return found


def round_faults(
    table: pa.Table, schema: LogSchema, item: NDArray[np.int64]
) -> Iterator[tuple[str, str, str, Mask]]:
    """Find what is wrong with whole rounds.

    Args:
        table: rows whose columns have the right types.
        item: (n,) item numbers, negative where unknown.

    Yields:
        (column, problem, what was expected, mask of rows).
    """
    rounds = table_rounds(table, schema)
    number = rounds.number
    position = positions(table, schema)
    place = np.lexsort((position, number))
    wrong = np.zeros(table.num_rows, dtype=bool)
    wrong[place] = position[place] != rounds.position
    assert schema.position is not None and schema.round_id is not None
    yield (
        schema.position,
        "no position of a whole round",
        f"each of 0, 1, 2, ... once in the consecutive rows of a round ('{schema.round_id}'); sort "
        "a log whose rounds are scattered",
        wrong,
    )
    yield (
        schema.round_id,
        "too long",
        f"a round of at most {MAX_POSITIONS:,} rows",
        np.repeat(rounds.lengths > MAX_POSITIONS, rounds.lengths),
    )
    by_item = np.lexsort((item, number))
    again = np.zeros(table.num_rows, dtype=bool)
    same = (item[by_item][1:] == item[by_item][:-1]) & (number[by_item][1:] == number[by_item][:-1])
    again[by_item[1:]] = same & (item[by_item[1:]] >= 0)
    yield schema.action, "shown twice in its round", "another item at each position", again
    first = np.repeat(rounds.first, rounds.lengths)
    # A column of `keep` is of the item, also where an evaluation reads it as if of the context.
    names = [name for spec in schema.context for name in spec.sources if name not in schema.keep]
    names += [name for name in (schema.user_id, schema.behavior_policy) if name is not None]
    names += [] if schema.eligible is None else schema.eligible.log_columns
    for name in dict.fromkeys(names):
        key = codes(table.column(name))
        other = key != key[first]
        yield name, "another than in its round's first row", "one context a round", other
    if schema.pscore_kind == "slate" and schema.pscore is not None:
        pscore = as_float_array(table.column(schema.pscore))
        yield (
            schema.pscore,
            "another than in its round's first row",
            "the probability of the whole slate, the same in each of its rows (pscore_kind: slate)",
            pscore != pscore[first],
        )


def whole_rounds(rows: Mask, table: pa.Table, schema: LogSchema) -> Mask:
    """(n,) whether a row's round has one of `rows`.

    Rows of a round id that lie apart in the table are one round. So are consecutive rows of
    different ids whose positions go on, of which one is bad: an id may be missing or wrong.
    """
    if not schema.slates or not rows.any():
        return rows
    assert schema.round_id is not None, "a log of slates has round ids"
    rounds = table_rounds(table, schema)
    bad = rounds.sum(rows.astype(np.int64)) > 0
    least = np.minimum.reduceat(positions(table, schema), rounds.first)
    goes_on = bad[1:] & (least[1:] == rounds.lengths[:-1])
    bad[:-1] |= goes_on
    key = codes(table.column(schema.round_id))[rounds.first]
    bad |= np.isin(key, key[bad])
    return np.repeat(bad, rounds.lengths)


def codes(column: Column) -> NDArray[np.uint64]:
    """(n,) numbers that are equal where values are; of lists, a 64-bit hash of the codes."""
    array = as_array(column)
    if not is_list(array.type):
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        index = pc.fill_null(pc.dictionary_encode(array).indices, -1)
        found: NDArray[np.int64] = pc.cast(index, pa.int64()).to_numpy(zero_copy_only=False)
        return found.view(np.uint64)
    values, offsets = list_parts(array)
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    mixed = splitmix64(codes(values) ^ splitmix64(inside.astype(np.uint64)))
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    total: NDArray[np.uint64] = running[offsets[1:]] - running[offsets[:-1]]
    return total


def whole_round_tables(
    located: Iterable[tuple[pa.RecordBatch, TableOrigin]], schema: LogSchema
) -> Iterator[tuple[pa.Table, TableOrigin]]:
    """Move the last round of each batch to the next one, so that no round is cut.

    Args:
        located: consecutive batches of one file, each with its origin.
    """
    waiting: list[pa.Table] = []
    origin: TableOrigin | None = None
    for batch, place in located:
        table = pa.Table.from_batches([batch])
        if not schema.slates:
            yield table, place
            continue
        waiting = [*waiting, table]
        if origin is None:
            origin = place
        else:
            origin = origin._replace(bad_cells=(*origin.bad_cells, *place.bad_cells))
        table = pa.concat_tables(waiting).combine_chunks()
        last = int(np.flatnonzero(round_starts(table, schema))[-1])
        if last:
            yield table.slice(0, last), origin
            if origin.file_row is not None:
                origin = origin._replace(file_row=origin.file_row + last)
        waiting = [table.slice(last)]
        if table.num_rows - last > MAX_POSITIONS:
            # The checks refuse it; do not gather a whole file of one round id.
            yield waiting.pop(), origin
            origin = None
    if waiting and origin is not None:
        yield pa.concat_tables(waiting), origin


def cut_rounds(
    tables: Iterable[pa.Table], schema: LogSchema, size: int, first: int = 0
) -> Iterator[pa.Table]:
    """Cut rows into tables that begin with the first round at or after each multiple of `size`.

    Args:
        tables: whole rounds in the order of positions.
        first: number in the log of the first row.

    Raises:
        DataError: a round is longer than `size`.
    """
    waiting: list[pa.Table] = []
    edge = (first // size + 1) * size
    at = first
    for table in tables:
        begins = at + np.flatnonzero(positions(table, schema) == 0)
        start = 0
        while (place := int(np.searchsorted(begins, edge))) < begins.size:
            stop = int(begins[place]) - at
            piece = pa.concat_tables([*waiting, table.slice(start, stop - start)])
            if piece.num_rows:
                yield piece.combine_chunks()
            if begins[place] >= edge + size:
                raise DataError(f"a round has more rows than a row group ({size:,})")
            waiting, start, edge = [], stop, edge + size
        waiting.append(table.slice(start))
        at += table.num_rows
    left = pa.concat_tables(waiting) if waiting else None
    if left is not None and left.num_rows:
        yield left.combine_chunks()


def rounds_between(
    tables: Iterable[pa.Table], schema: LogSchema, first: int, last: int
) -> Iterator[tuple[int, pa.Table]]:
    """The rounds that begin with rows first .. last - 1, from tables that begin with row `first`.

    Yields (number of the table's first row, table).
    """
    at, begun = first, first == 0
    for table in tables:
        begins = np.flatnonzero(positions(table, schema) == 0)
        start = 0
        if not begun:
            start = int(begins[0]) if begins.size else table.num_rows
            begun = bool(begins.size)
            if at + start >= last:
                return
        place = int(np.searchsorted(begins, last - at))
        if place < begins.size:
            if begins[place] > start:
                yield at + start, table.slice(start, int(begins[place]) - start)
            return
        if start < table.num_rows:
            yield at + start, table.slice(start)
        at += table.num_rows


def table_cuts(table: pa.Table, schema: LogSchema, size: int) -> list[int]:
    """First rows of pieces of about `size` rows, and n."""
    if schema.slates:
        return cut_before(round_starts(table, schema), size)
    return [*range(0, table.num_rows, size), table.num_rows]
