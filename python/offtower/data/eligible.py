"""Eligible items: which items could have been shown for a row, as the log schema says."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_array, is_category, is_list, is_text, timestamps
from offtower.data.eligible_forms import (
    WORD,
    AttributeItems,
    IntervalItems,
    Numbers,
    Words,
    time_kind,
)
from offtower.data.eligible_schema import EligibleSchema
from offtower.data.features import CPU, BagArray, concat, take_bag, tensor_of
from offtower.data.item_lists import entry_rows, holds, item_lists
from offtower.data.schema import LogSchema
from offtower.errors import DataError

if TYPE_CHECKING:
    from offtower.ops.types import Eligibility, ItemLists

CACHE_BYTES = 1 << 29
"""Bitmaps that are kept between batches."""
BATCH_BYTES = 1 << 34
"""Bitmaps of one batch, at most."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class EligibleRows:
    """The eligible items of n rows.

    Attributes:
        items: the items' side, which makes bitmaps of the groups.
        group: (n,) key of the combination of attribute values and of the time's segment; rows with
            equal keys have equal bitmaps. None without `attribute` and `interval`.
        excluded: items that a row may not show. None without `exclude`.
        candidates: the only items that a row may show. None without `candidates`.
    """

    items: EligibleItems
    group: Numbers | None
    excluded: BagArray | None
    candidates: BagArray | None

    def __len__(self) -> int:
        return next(
            len(part) for part in (self.group, self.excluded, self.candidates) if part is not None
        )

    @property
    def nbytes(self) -> int:
        """Size of the rows in bytes, without the items' side."""
        lists = [part for part in (self.excluded, self.candidates) if part is not None]
        size = 0 if self.group is None else int(self.group.nbytes)
        return size + sum(one.values.nbytes + one.offsets.nbytes for one in lists)

    def take(self, index: Numbers) -> EligibleRows:
        """Select rows by index."""
        return EligibleRows(
            self.items,
            None if self.group is None else self.group[index],
            None if self.excluded is None else take_bag(self.excluded, index),
            None if self.candidates is None else take_bag(self.candidates, index),
        )

    @classmethod
    def concat(cls, parts: Sequence[EligibleRows]) -> EligibleRows:
        """Concatenate the rows of all parts."""
        groups = [part.group for part in parts if part.group is not None]
        return cls(
            parts[0].items,
            np.concatenate(groups) if groups else None,
            _joined([part.excluded for part in parts]),
            _joined([part.candidates for part in parts]),
        )

    def on(self, device: torch.device = CPU) -> Eligibility:
        """Return the sets for the operators (see `EligibleItems.of`)."""
        return self.items.of(self, device)

    def contains(self, item: Numbers) -> Mask:
        """(n,) whether each row's item (n,) is eligible."""
        refused = np.zeros(len(self), dtype=bool)
        for mask in self.items.refusals(self, item).values():
            refused |= mask
        return ~refused

    def count(self) -> Numbers:
        """(n,) numbers of eligible items."""
        return self.items.count(self)


class EligibleItems:
    """The items' side of the schema's section `eligible`.

    Bitmaps have one bit for each item: 12.5 MB for 1e8 items. They are made for the groups of a
    batch, and those used last are kept.

    Args:
        catalogue: has the columns that the section names.
        schema: of the log, with a section `eligible`.
        cache_bytes: of bitmaps that are kept between batches.
        batch_bytes: of the bitmaps of one batch, at most.

    Raises:
        DataError: the catalogue lacks a column, or a column is of a wrong type.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        schema: LogSchema,
        *,
        cache_bytes: int = CACHE_BYTES,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        assert schema.eligible is not None, "the caller checks the schema"
        section = schema.eligible
        self.section, self.num_items = section, catalogue.num_items
        self._timestamp = schema.timestamp
        self._catalogue = catalogue.index_only()
        self._attributes = [
            AttributeItems(form, _item_column(catalogue, form.item)) for form in section.attribute
        ]
        self._interval: IntervalItems | None = None
        if section.interval is not None:
            form = section.interval
            self._interval = IntervalItems(
                form,
                None if form.start is None else _item_column(catalogue, form.start),
                None if form.until is None else _item_column(catalogue, form.until),
            )
        sizes = [one.cardinality for one in self._attributes]
        if self._interval is not None:
            sizes.append(self._interval.cardinality)
        self._sizes = sizes
        if np.prod([float(size) for size in sizes]) >= 2.0**62:
            raise DataError(
                "the section 'eligible' has too many combinations of attribute values and times: "
                + " x ".join(f"{size:,}" for size in sizes)
            )
        self._cache_bytes, self._batch_bytes = cache_bytes, batch_bytes
        self._bitmaps: OrderedDict[tuple[int, torch.device], torch.Tensor] = OrderedDict()
        self._counts: dict[int, int] = {}
        self._stacked: tuple[Numbers, torch.Tensor] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be made again."""
        return {
            **self.__dict__,
            "_bitmaps": OrderedDict(),
            "_counts": {},
            "_stacked": None,
            "_lock": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def encode(self, table: pa.Table) -> EligibleRows:
        """Encode the columns that the section reads; a null list is empty.

        Raises:
            DataError: a column is missing or of a wrong type.
        """
        self.check_types(table.schema, "the table")
        group: Numbers | None = None
        for part, size in zip(self._numbers(table), self._sizes, strict=True):
            group = part if group is None else group * np.int64(size) + part
        section = self.section
        lists = [
            None if form is None else item_lists(table.column(form.column), self._catalogue)[0]
            for form in (section.exclude, section.candidates)
        ]
        return EligibleRows(self, group, *lists)

    def of_contexts(self, table: pa.Table, *, at: datetime | None = None) -> EligibleRows:
        """The eligible items of contexts that are to be served.

        The same columns give the same sets as in a log, so that an evaluation of the served log
        sees what the policy chose from.

        Args:
            table: has the columns that the section names.
            at: the time of serving, for `interval`, where the table has no column of timestamps;
                the present by default. Log the same time.

        Raises:
            DataError: a column is missing or of a wrong type, a value is null, a candidate is no
                item of the catalogue, or a row has no eligible item; names the row.
        """
        times = self.times(table, at)
        if times is not None and self._timestamp not in table.column_names:
            table = table.append_column(self._timestamp, times)
        for column, problem, expected, mask in self.faulty_columns(table, "the contexts"):
            row = int(np.flatnonzero(mask)[0])
            raise DataError(
                f"row {row} of the contexts: column '{column}' is "
                f"{table.column(column)[row].as_py()!r} ({problem}), expected {expected}"
            )
        rows = self.encode(table)
        self.check_not_empty(rows, "the contexts")
        return rows

    def times(self, table: pa.Table, at: datetime | None = None) -> pa.Array | None:
        """(n,) times by which the items of contexts are eligible, for a log of what was served;
        None without `interval`. The arguments are those of `of_contexts`.

        Raises:
            DataError: there is no column of times, and the unit of the catalogue's is not known.
        """
        if self._interval is None:
            return None
        if self._timestamp in table.column_names:
            return as_array(table.column(self._timestamp))
        return _times(at, table.num_rows, self._interval.kind)

    def check_not_empty(self, rows: EligibleRows, where: str, first_row: int = 0) -> None:
        """Check that every row has an eligible item.

        Raises:
            DataError: names the first row without one.
        """
        empty = np.flatnonzero(rows.count() == 0)
        if empty.size:
            raise DataError(
                f"row {first_row + int(empty[0])} of {where} has no eligible item "
                f"({empty.size:,} such rows): all items are ruled out by {self._described()} "
                "together"
            )

    def of(self, rows: EligibleRows, device: torch.device = CPU) -> Eligibility:
        """Return the sets of a batch for the operators.

        Where there are candidates, the other forms are applied to these lists, and no bitmap is
        made.

        Raises:
            DataError: the batch has so many groups that their bitmaps exceed `batch_bytes`.
        """
        from offtower.ops.types import Eligibility

        if rows.candidates is not None:
            return Eligibility(candidates=_tensors(self._allowed(rows), device))
        group = bitmap = None
        if rows.group is not None:
            keys, index = np.unique(rows.group, return_inverse=True)
            group = tensor_of(index.astype(np.int32), device)
            bitmap = self._bitmap(keys, device)
        excluded = None if rows.excluded is None else _tensors(rows.excluded, device)
        return Eligibility(group=group, bitmap=bitmap, excluded=excluded)

    def count(self, rows: EligibleRows) -> Numbers:
        """(n,) numbers of eligible items."""
        if rows.candidates is not None:
            return np.diff(self._allowed(rows).offsets)
        count = np.full(len(rows), self.num_items, dtype=np.int64)
        if rows.group is not None:
            keys, index = np.unique(rows.group, return_inverse=True)
            count = np.array([self._group_count(int(key)) for key in keys], dtype=np.int64)[index]
        if rows.excluded is not None:
            row = entry_rows(rows.excluded)
            also = self._in_group(rows, row, rows.excluded.values)
            count = count - np.bincount(row[also], minlength=len(rows))
        return count

    def cluster_counts(
        self, rows: EligibleRows, label: Numbers, num_clusters: int
    ) -> NDArray[np.int64]:
        """(n, C) numbers of eligible items of each cluster, in O(N) for each group of the rows.

        Args:
            label: (N,) cluster of each item, from 0 to C - 1.
        """

        def by_row(lists: BagArray, kept: Mask) -> NDArray[np.int64]:
            key = entry_rows(lists)[kept] * np.int64(num_clusters) + label[lists.values[kept]]
            flat = np.bincount(key, minlength=len(lists) * num_clusters)
            return flat.reshape(len(lists), num_clusters).astype(np.int64)

        if rows.candidates is not None:
            allowed = self._allowed(rows)
            return by_row(allowed, np.ones(allowed.values.size, dtype=bool))
        if rows.group is None:
            index = np.zeros(len(rows), dtype=np.int64)
            groups = np.bincount(label, minlength=num_clusters)[None].astype(np.int64)
        else:
            keys, index = np.unique(rows.group, return_inverse=True)
            groups = np.stack(
                [
                    np.bincount(label[self._group_items(int(key))], minlength=num_clusters)
                    for key in keys
                ]
            ).astype(np.int64)
        counts: NDArray[np.int64] = groups[index]
        if rows.excluded is not None:
            row = entry_rows(rows.excluded)
            counts -= by_row(rows.excluded, self._in_group(rows, row, rows.excluded.values))
        return counts

    def refusals(self, rows: EligibleRows, item: Numbers) -> dict[str, Mask]:
        """By form, the (n,) rows for which the form rules out the row's item (n,)."""
        every = np.arange(len(rows), dtype=np.int64)
        parts = self._split(rows.group)
        found: dict[str, Mask] = {}
        for attribute, number in zip(self._attributes, parts, strict=False):
            found[f"attribute {attribute.form.item}"] = ~attribute.has(number, item)
        if self._interval is not None:
            found["interval"] = ~self._interval.has(parts[-1], item)
        if rows.excluded is not None:
            found["exclude"] = holds(rows.excluded, every, item, self.num_items)
        if rows.candidates is not None:
            found["candidates"] = ~holds(rows.candidates, every, item, self.num_items)
        return found

    def faulty_columns(self, table: pa.Table, file: str) -> Iterator[tuple[str, str, str, Mask]]:
        """Bad values of the columns that the section reads: column, problem, what is expected, and
        the (n,) mask of the rows.

        Raises:
            DataError: a column is missing or of a wrong type.
        """
        self.check_types(table.schema, file)
        for attribute in self._attributes:
            name = attribute.form.context
            column = table.column(name)
            null = _null(column)
            expected = f"a value that the column '{attribute.form.item}' of some item has"
            unknown = (attribute.number(column) == attribute.cardinality - 1) & ~null
            yield from _found(name, expected, {"null": null, "a value of no item": unknown})
        if self._interval is not None:
            assert self._timestamp is not None, "the schema checks it"
            null = _null(table.column(self._timestamp))
            yield from _found(self._timestamp, "a time", {"null": null})
        if self.section.candidates is not None:
            name = self.section.candidates.column
            column = table.column(name)
            lists, unknown_ids = item_lists(column, self._catalogue)
            null = _null(column)
            unknown = unknown_ids > 0
            empty = (np.diff(lists.offsets) == 0) & ~null & ~unknown
            expected = f"a list of ids of the catalogue's {self.num_items:,} items"
            yield from _found(
                name, expected, {"null": null, "with an unknown item": unknown, "empty": empty}
            )

    def faulty_actions(self, table: pa.Table, action: str) -> Iterator[tuple[str, str, str, Mask]]:
        """Logged actions outside their row's eligible items, by the form that rules them out; as
        for `faulty_columns`.

        Rows whose own columns are bad, or whose action is unknown, are passed over.
        """
        item = self._catalogue.index_of(table.column(action))
        left = item >= 0
        for _, _, _, mask in self.faulty_columns(table, "the table"):
            left &= ~mask
        index = np.flatnonzero(left)
        if index.size == 0:
            return
        rows = self.encode(table.take(pa.array(index)))
        for form, refused in self.refusals(rows, item[index]).items():
            mask = np.zeros(table.num_rows, dtype=bool)
            mask[index[refused]] = True
            if mask.any():
                yield (
                    action,
                    self._refusal(form),
                    "an eligible item (the schema's 'eligible')",
                    mask,
                )

    def unknown_excluded(self, table: pa.Table) -> tuple[int, int]:
        """Numbers of excluded ids that the catalogue does not have, and of all excluded ids."""
        if self.section.exclude is None:
            return 0, 0
        column = table.column(self.section.exclude.column)
        lists, unknown = item_lists(column, self._catalogue)
        return int(unknown.sum()), int(lists.values.size + unknown.sum())

    def check_types(self, arrow: pa.Schema, file: str) -> None:
        """Check the columns that the section reads.

        Raises:
            DataError: one is missing or of a wrong type.
        """
        names = list(self.section.log_columns)
        if self._interval is not None and self._timestamp is not None:
            names.append(self._timestamp)
        for name in names:
            if name not in arrow.names:
                raise DataError(
                    f"{file} has no column '{name}', which the section 'eligible' of the log "
                    f"schema reads; it has {', '.join(arrow.names)}"
                )
        for attribute in self._attributes:
            kind = arrow.field(attribute.form.context).type
            if not is_category(kind) or is_text(kind) != attribute.text:
                wanted = "text" if attribute.text else "integers"
                raise DataError(
                    f"{file}: column '{attribute.form.context}' holds {kind}, expected {wanted}, "
                    f"as the catalogue's column '{attribute.form.item}' has"
                )
        for name in self.section.lists:
            kind = arrow.field(name).type
            values = kind.value_type if is_list(kind) else None
            if values is None or pa.types.is_null(values):
                fits = values is not None
            else:
                fits = is_category(values) and is_text(values) == self._catalogue.text_ids
            if not fits:
                wanted = "text" if self._catalogue.text_ids else "integers"
                raise DataError(
                    f"{file}: column '{name}' holds {kind}, expected lists of {wanted}, as the "
                    "item ids of the catalogue are"
                )
        if self._interval is not None and self._timestamp is not None:
            kind = arrow.field(self._timestamp).type
            found = time_kind(kind, f"{file}: column '{self._timestamp}'")
            if found != self._interval.kind:
                raise DataError(
                    f"{file}: column '{self._timestamp}' holds {found}, but the catalogue's "
                    f"columns of eligible.interval hold {self._interval.kind}; write both alike"
                )

    def _numbers(self, table: pa.Table) -> list[Numbers]:
        """The parts of the group's key."""
        parts = [one.number(table.column(one.form.context)) for one in self._attributes]
        if self._interval is not None:
            assert self._timestamp is not None, "the schema checks it"
            column = as_array(table.column(self._timestamp))
            parts.append(self._interval.number(timestamps(pc.fill_null(column, _epoch(column)))))
        return parts

    def _split(self, group: Numbers | None) -> list[Numbers]:
        """The numbers that a group's key consists of."""
        parts: list[Numbers] = []
        if group is None:
            return parts
        for size in reversed(self._sizes):
            group, part = np.divmod(group, np.int64(size))
            parts.append(part)
        return parts[::-1]

    def _in_group(self, rows: EligibleRows, row: Numbers, item: Numbers) -> Mask:
        """(m,) whether the attribute values and the time of `row` (m,) admit `item` (m,)."""
        found = np.ones(len(row), dtype=bool)
        if rows.group is None:
            return found
        parts = self._split(rows.group[row])
        for attribute, number in zip(self._attributes, parts, strict=False):
            found &= attribute.has(number, item)
        if self._interval is not None:
            found &= self._interval.has(parts[-1], item)
        return found

    def _allowed(self, rows: EligibleRows) -> BagArray:
        """The candidates that the other forms admit."""
        lists = rows.candidates
        assert lists is not None, "the caller checks it"
        row = entry_rows(lists)
        kept = self._in_group(rows, row, lists.values)
        if rows.excluded is not None:
            kept &= ~holds(rows.excluded, row, lists.values, self.num_items)
        ends = np.concatenate([[0], np.cumsum(np.bincount(row[kept], minlength=len(lists)))])
        return BagArray(lists.values[kept], ends.astype(np.int64))

    def _bitmap(self, keys: Numbers, device: torch.device) -> torch.Tensor:
        """(G, ceil(N / 64)) int64 of the groups with these keys."""
        size = len(keys) * 8 * -(-self.num_items // WORD)
        if size > self._batch_bytes:
            raise DataError(
                f"a batch has {len(keys):,} different sets of eligible items, whose bitmaps over "
                f"{self.num_items:,} items take {size / 2**30:.1f} GiB, more than "
                f"{self._batch_bytes / 2**30:.1f} GiB: make training.batch_size and "
                "evaluation.batch_rows smaller, or round the times of eligible.interval"
            )
        with self._lock:
            stacked = self._stacked
            if (
                stacked is not None
                and stacked[1].device == device
                and np.array_equal(stacked[0], keys)
            ):
                return stacked[1]
            self._stacked = None
            found = torch.stack([self._one(int(key), device) for key in keys])
            if found.nbytes <= self._cache_bytes:
                self._stacked = keys, found
            return found

    def _one(self, key: int, device: torch.device) -> torch.Tensor:
        """(ceil(N / 64),) bitmap of one group, from the cache if it is there."""
        found = self._bitmaps.get((key, device))
        if found is not None:
            self._bitmaps.move_to_end((key, device))
            return found
        found = tensor_of(self._words(key).view(np.int64), device)
        self._bitmaps[key, device] = found
        size = found.nbytes
        while len(self._bitmaps) > 1 and size * len(self._bitmaps) > self._cache_bytes:
            self._bitmaps.popitem(last=False)
        return found

    def _words(self, key: int) -> Words:
        parts = [int(part[0]) for part in self._split(np.array([key], dtype=np.int64))]
        words: Words | None = None
        for attribute, number in zip(self._attributes, parts, strict=False):
            bits = attribute.bits(number)
            words = bits if words is None else words & bits
        if self._interval is not None:
            bits = self._interval.bits(parts[-1])
            words = bits if words is None else words & bits
        assert words is not None, "a group has an attribute or an interval"
        return words

    def _group_items(self, key: int) -> Numbers:
        """The items of a group."""
        with self._lock:
            bits = self._one(key, CPU).numpy().view(np.uint8)
        return np.flatnonzero(np.unpackbits(bits, count=self.num_items, bitorder="little"))

    def _group_count(self, key: int) -> int:
        with self._lock:
            if key not in self._counts:
                if len(self._counts) >= _KEPT_COUNTS:
                    self._counts.clear()
                bits = self._one(key, CPU).numpy().view(np.uint8)
                self._counts[key] = int(_BITS_OF_BYTE[bits].sum(dtype=np.int64))
            return self._counts[key]

    def _refusal(self, form: str) -> str:
        section = self.section
        if form == "interval":
            interval = section.interval
            assert interval is not None
            names = [name for name in (interval.start, interval.until) if name is not None]
            return f"not available at the row's time by {' and '.join(repr(n) for n in names)}"
        if form == "exclude":
            assert section.exclude is not None
            return f"excluded by the row's '{section.exclude.column}'"
        if form == "candidates":
            assert section.candidates is not None
            return f"not among the row's '{section.candidates.column}'"
        name = form.removeprefix("attribute ")
        one = next(a for a in section.attribute if a.item == name)
        return f"its '{one.item}' lacks the row's '{one.context}'"

    def _described(self) -> str:
        section = self.section
        names = [f"attribute '{form.item}'" for form in section.attribute]
        names += [n for n in ("interval", "exclude", "candidates") if getattr(section, n)]
        return ", ".join(names)


def eligible_items(catalogue: Catalogue, schema: LogSchema) -> EligibleItems | None:
    """The items' side for a log, made once for each catalogue; None without a section `eligible`.

    Raises:
        DataError: as for `EligibleItems`.
    """
    section = schema.eligible
    if section is None:
        return None
    key = (section, schema.timestamp)
    return catalogue.derived(key, lambda: EligibleItems(catalogue, schema))


def reading_index(catalogue: Catalogue, schema: LogSchema) -> Catalogue:
    """What reads rows of a log in another process: `index_only`, with the eligible items."""
    eligible_items(catalogue, schema)
    return catalogue.index_only()


_KEPT_COUNTS = 1_000_000
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(
    axis=1, dtype=np.uint8
)


def _joined(parts: Sequence[BagArray | None]) -> BagArray | None:
    lists = [part for part in parts if part is not None]
    if not lists:
        return None
    joined = concat([{"": one} for one in lists])[""]
    assert isinstance(joined, BagArray)
    return joined


def _tensors(lists: BagArray, device: torch.device) -> ItemLists:
    from offtower.ops.types import ItemLists

    return ItemLists(tensor_of(lists.offsets, device), tensor_of(lists.values, device))


def _item_column(catalogue: Catalogue, name: str) -> pa.ChunkedArray:
    if name not in catalogue.schema.columns:
        raise DataError(
            f"the section 'eligible' of the log schema reads the catalogue's column '{name}', "
            "which the catalogue was opened without; it has "
            f"{', '.join(catalogue.schema.columns)}. Ingest both together, or name it in the "
            "catalogue schema's 'eligible'"
        )
    return catalogue.column(name)


def _found(
    column: str, expected: str, problems: dict[str, Mask]
) -> Iterator[tuple[str, str, str, Mask]]:
    for problem, mask in problems.items():
        if mask.any():
            yield column, problem, expected, mask


def _null(column: pa.ChunkedArray) -> Mask:
    nulls: Mask = pc.is_null(as_array(column)).to_numpy(zero_copy_only=False)
    return nulls


def _epoch(column: pa.Array) -> pa.Scalar:
    return pc.cast(pa.scalar(0, pa.int64()), column.type)


def _times(at: datetime | None, n: int, kind: str) -> pa.Array:
    """A column of one time, as the catalogue's times are."""
    if kind == "integers":
        raise DataError(
            "the contexts need a column of timestamps: the catalogue's times of eligible.interval "
            "are integers, whose unit is not known"
        )
    now = at or datetime.now(UTC)
    now = now if now.tzinfo is not None else now.replace(tzinfo=UTC)
    micros = pa.scalar(round(now.timestamp() * 1e6), pa.int64())
    zoned = kind == "times with a time zone"
    return pa.repeat(micros, n).cast(pa.timestamp("us", tz="UTC" if zoned else None))


__all__ = [
    "EligibleItems",
    "EligibleRows",
    "EligibleSchema",
    "eligible_items",
    "reading_index",
]
