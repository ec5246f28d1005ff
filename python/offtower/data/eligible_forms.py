"""The item side of the forms `attribute` and `interval`: which items a value or a time makes
eligible."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import (
    Column,
    as_array,
    category_values,
    distinct_values,
    is_category,
    is_list,
    is_text,
    list_parts,
)
from offtower.data.eligible_schema import AttributeForm, IntervalForm
from offtower.data.item_lists import contains_sorted
from offtower.data.lookup import Vocabulary
from offtower.errors import DataError

WORD = 64
"""Bits of a word of a bitmap."""

Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]

_ALWAYS_FROM, _ALWAYS_UNTIL = np.iinfo(np.int64).min, np.iinfo(np.int64).max


class AttributeItems:
    """Which items have which value of an attribute, in 8 bytes for each (value, item).

    Args:
        form: names the columns.
        column: of the catalogue, a category or a bag of categories.

    Raises:
        DataError: the column is of another type, or text that lists values.
    """

    def __init__(self, form: AttributeForm, column: pa.ChunkedArray) -> None:
        self.form, self.num_items = form, len(column)
        kind = column.type
        if is_list(kind) and is_category(kind.value_type):
            values, offsets = list_parts(column)
            item = np.repeat(np.arange(self.num_items), np.diff(offsets))
        elif is_category(kind):
            values, item = as_array(column), np.arange(self.num_items)
        else:
            raise DataError(
                f"eligible.attribute names the catalogue's column '{form.item}', which is {kind}: "
                "expected text, integers or lists of these"
            )
        distinct, index = distinct_values(values)
        order = pc.sort_indices(distinct)
        self.text = is_text(distinct.type)
        if self.text and not is_list(kind):
            _check_no_list(form.item, distinct)
        self.values = Vocabulary(distinct.take(order))
        rank = np.empty(len(distinct), dtype=np.int64)
        rank[order.to_numpy(zero_copy_only=False)] = np.arange(len(distinct))
        known = index < len(distinct)
        self._pairs = np.unique(rank[index[known]] * np.int64(self.num_items) + item[known])
        """Sorted value * N + item."""

    @property
    def cardinality(self) -> int:
        """Numbers that `number` returns: the values, and one for null and unknown ones."""
        return len(self.values.values) + 1

    def number(self, column: Column) -> Numbers:
        """(n,) number of each row's value; the last one for null and for values of no item."""
        if is_text(column.type) != self.text:
            return np.full(len(column), self.cardinality - 1, dtype=np.int64)
        distinct, index = distinct_values(column)
        wanted = self.values.values
        if len(wanted) == 0:
            return np.full(len(column), self.cardinality - 1, dtype=np.int64)
        found = self.values.find(pc.cast(category_values(distinct), wanted.type))
        last = self.cardinality - 1
        return np.append(np.where(found < 0, last, found), last)[index]

    def has(self, number: Numbers, item: Numbers) -> NDArray[np.bool_]:
        """(m,) whether items have the values with these numbers."""
        return contains_sorted(self._pairs, number * np.int64(self.num_items) + item)

    def items(self, number: int) -> Numbers:
        """Sorted items with a value."""
        first = number * self.num_items
        low, high = np.searchsorted(self._pairs, [first, first + self.num_items])
        return self._pairs[low:high] - first

    def bits(self, number: int) -> Words:
        """(ceil(N / 64),) bitmap of the items with a value."""
        words = np.zeros(-(-self.num_items // WORD), dtype=np.uint64)
        _toggle(words, self.items(number))
        return words


def _check_no_list(name: str, values: pa.Array) -> None:
    """Check that no text is a JSON list: no row's value would equal it, and its item be eligible
    nowhere.

    Raises:
        DataError: one is.
    """
    bracketed = pc.and_(pc.starts_with(values, "["), pc.ends_with(values, "]"))
    for text in values.filter(bracketed).to_pylist():
        try:
            json.loads(text)
        except ValueError:
            continue
        raise DataError(
            f"eligible.attribute names the catalogue's column '{name}', which holds the text "
            f"{text!r}: lists in text files are read as lists only where the schema says so. Name "
            f"the column in catalogue.features as a bag ({{name: {name}, kind: bag}})"
        )


class IntervalItems:
    """Which items are available when.

    Times between two breakpoints have the same items, so a time's number is that of its segment.
    Bitmaps of neighboring segments differ in a few bits, which are changed in a copy.

    Args:
        form: names the columns.
        start, until: columns of the catalogue; None where the form names none.

    Raises:
        DataError: a column holds no times, or the two are of different kinds.
    """

    def __init__(
        self,
        form: IntervalForm,
        start: pa.ChunkedArray | None,
        until: pa.ChunkedArray | None,
    ) -> None:
        self.form = form
        kinds = {
            name: time_kind(column.type, f"eligible.interval names the catalogue's column '{name}'")
            for name, column in ((form.start, start), (form.until, until))
            if column is not None and name is not None
        }
        if len(set(kinds.values())) > 1:
            raise DataError(
                "eligible.interval names columns of different kinds: "
                + ", ".join(f"'{name}' holds {kind}" for name, kind in kinds.items())
                + "; write both alike"
            )
        self.kind = next(iter(kinds.values()))
        given = start if start is not None else until
        assert given is not None, "the schema names at least one column"
        self.num_items = len(given)
        self._start = _times(start, self.num_items, _ALWAYS_FROM)
        self._until = _times(until, self.num_items, _ALWAYS_UNTIL)
        points = np.unique(np.concatenate([self._start, self._until]))
        bounds = (points > _ALWAYS_FROM) & (points < _ALWAYS_UNTIL)
        self._points: Numbers = points[bounds]
        self._events: tuple[Numbers, Numbers] | None = None
        self._last: tuple[int, Words] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_events": None, "_last": None}

    @property
    def cardinality(self) -> int:
        """Number of segments."""
        return len(self._points) + 1

    def number(self, time: Numbers) -> Numbers:
        """(n,) segment of each time."""
        return np.searchsorted(self._points, time, side="right").astype(np.int64)

    def has(self, number: Numbers, item: Numbers) -> NDArray[np.bool_]:
        """(m,) whether items are available in these segments."""
        time = self._first_time(number)
        found: NDArray[np.bool_] = (self._start[item] <= time) & (time < self._until[item])
        return found

    def bits(self, number: int) -> Words:
        """(ceil(N / 64),) bitmap of the items that are available in a segment."""
        if self._last is not None:
            before, words = self._last
            low, high = sorted((before, number))
            offsets, items = self._toggles()
            changed = items[offsets[low + 1] : offsets[high + 1]]
            if 8 * changed.size < self.num_items:
                words = words.copy()
                _toggle(words, changed)
                self._last = number, words
                return words
        time = self._first_time(np.array([number]))[0]
        available = (self._start <= time) & (time < self._until)
        padded = np.zeros(-(-self.num_items // WORD) * WORD, dtype=bool)
        padded[: self.num_items] = available
        words = np.packbits(padded, bitorder="little").view("<u8").astype(np.uint64)
        self._last = number, words
        return words

    def _first_time(self, number: Numbers) -> Numbers:
        """The first time of each segment."""
        before = np.concatenate([[_ALWAYS_FROM], self._points])
        return before[number]

    def _toggles(self) -> tuple[Numbers, Numbers]:
        """Items that come or go at the beginning of each segment: offsets (segments + 1,) and
        items."""
        if self._events is None:
            ever = np.flatnonzero(self._start < self._until)
            segment = np.concatenate(
                [self.number(self._start[ever]), self.number(self._until[ever])]
            )
            # Times without bound are no events.
            bounded = np.concatenate(
                [self._start[ever] > _ALWAYS_FROM, self._until[ever] < _ALWAYS_UNTIL]
            )
            segment, item = segment[bounded], np.concatenate([ever, ever])[bounded]
            order = np.argsort(segment, kind="stable")
            counts = np.bincount(segment, minlength=self.cardinality)
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            self._events = offsets, item[order]
        return self._events


def time_kind(kind: pa.DataType, what: str) -> str:
    """Say what the values of a column of times are.

    Raises:
        DataError: the column holds no times; begins with `what`.
    """
    if pa.types.is_timestamp(kind):
        return "times with a time zone" if kind.tz is not None else "times without a time zone"
    if pa.types.is_date(kind):
        return "times without a time zone"
    if pa.types.is_integer(kind):
        return "integers"
    raise DataError(f"{what}, which is {kind}: expected timestamps, dates or integers")


def _times(column: pa.ChunkedArray | None, n: int, missing: int) -> Numbers:
    """(n,) times in microseconds, or integers as they are; `missing` for null."""
    if column is None:
        return np.full(n, missing, dtype=np.int64)
    array = as_array(column)
    if pa.types.is_date(array.type):
        array = pc.cast(array, pa.timestamp("us"))
    if pa.types.is_timestamp(array.type):
        array = pc.cast(array, pa.timestamp("us", tz=array.type.tz), safe=False)
    filled = pc.fill_null(pc.cast(array, pa.int64()), missing)
    return np.asarray(filled.to_numpy(zero_copy_only=False), dtype=np.int64)


def _toggle(words: Words, item: Numbers) -> None:
    """Flip the bits of some items; an item that stands twice keeps its bit."""
    bit = np.uint64(1) << (item % WORD).astype(np.uint64)
    np.bitwise_xor.at(words, item // WORD, bit)
