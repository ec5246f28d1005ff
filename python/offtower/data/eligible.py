"""Eligible items: which items could have been shown for a row, as the log schema says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_array
from offtower.data.eligible_checks import ColumnFault, EligibleChecks
from offtower.data.eligible_forms import Numbers
from offtower.data.eligible_groups import BitmapLimits, ItemGroups, Mask
from offtower.data.features import CPU, BagArray, concat, take_bag, tensor_of
from offtower.data.item_lists import entry_rows, holds, item_lists
from offtower.data.schema import LogSchema
from offtower.errors import DataError, NoEligibleItemsError

if TYPE_CHECKING:
    from offtower.ops.types import Eligibility, ItemLists


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
        limits: of the bitmaps' memory.

    Raises:
        DataError: the catalogue lacks a column, or a column is of a wrong type.
    """

    def __init__(
        self, catalogue: Catalogue, schema: LogSchema, limits: BitmapLimits = BitmapLimits()
    ) -> None:
        assert schema.eligible is not None, "the caller checks the schema"
        self.section, self.num_items = schema.eligible, catalogue.num_items
        self._catalogue = catalogue.index_only()
        self._groups = ItemGroups(catalogue, schema, limits)
        self.checks = EligibleChecks(schema.eligible, self._groups, self._catalogue)

    def id_columns(self) -> dict[str, bool]:
        """Columns of the log with ids or categories, and whether these are text or integers."""
        found = {form.form.context: form.text for form in self._groups.attributes}
        return found | dict.fromkeys(self.section.lists, self._catalogue.text_ids)

    @property
    def needs_times(self) -> bool:
        """Whether contexts must have a column of times: the catalogue's are integers, whose unit is
        not known."""
        interval = self._groups.interval
        return interval is not None and interval.kind == "integers"

    def encode(self, table: pa.Table) -> EligibleRows:
        """Encode the columns that the section reads; a null list is empty.

        Raises:
            DataError: a column is missing or of a wrong type.
        """
        self.checks.types(table.schema, "the table")
        section = self.section
        lists = [
            None if form is None else item_lists(table.column(form.column), self._catalogue)[0]
            for form in (section.exclude, section.candidates)
        ]
        return EligibleRows(self, self._groups.keys(table), *lists)

    def of_contexts(
        self, table: pa.Table, *, at: datetime | None = None, allow_empty: bool = False
    ) -> EligibleRows:
        """The eligible items of contexts that are to be served.

        The same columns give the same sets as in a log, so that an evaluation of the served log
        sees what the policy chose from.

        Args:
            table: has the columns that the section names.
            at: the time of serving, for `interval`, where the table has no column of timestamps;
                the present by default. Log the same time.
            allow_empty: accept rows without an eligible item.

        Raises:
            DataError: a column is missing or of a wrong type, a value is null, or a candidate is no
                item of the catalogue; names the row.
            NoEligibleItemsError: a row has no eligible item; names it.
        """
        times, name = self.times(table, at), self._groups.timestamp
        if times is not None and name not in table.column_names:
            table = table.append_column(name, times)
        for column, problem, expected, mask in self.checks.columns(table, "the contexts"):
            row = int(np.flatnonzero(mask)[0])
            raise DataError(
                f"row {row} of the contexts: column '{column}' is "
                f"{table.column(column)[row].as_py()!r} ({problem}), expected {expected}"
            )
        rows = self.encode(table)
        empty = np.flatnonzero(rows.count() == 0)
        if empty.size and not allow_empty:
            raise NoEligibleItemsError(
                f"row {int(empty[0])} of the contexts has no eligible item ({empty.size:,} such "
                f"rows): {self.checks.forms()} together rule out all items"
            )
        return rows

    def times(self, table: pa.Table, at: datetime | None = None) -> pa.Array | None:
        """(n,) times by which the items of contexts are eligible, for a log of what was served;
        None without `interval`. The arguments are those of `of_contexts`.

        Raises:
            DataError: there is no column of times, and the unit of the catalogue's is not known.
        """
        interval, name = self._groups.interval, self._groups.timestamp
        if interval is None:
            return None
        if name in table.column_names:
            return as_array(table.column(name))
        return _times(at, table.num_rows, interval.kind)

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
            bitmap = self._groups.bitmap(keys, device)
        excluded = None if rows.excluded is None else _tensors(rows.excluded, device)
        return Eligibility(group=group, bitmap=bitmap, excluded=excluded)

    def count(self, rows: EligibleRows) -> Numbers:
        """(n,) numbers of eligible items."""
        if rows.candidates is not None:
            return np.diff(self._allowed(rows).offsets)
        count = np.full(len(rows), self.num_items, dtype=np.int64)
        if rows.group is not None:
            keys, index = np.unique(rows.group, return_inverse=True)
            count = np.array([self._groups.count(int(key)) for key in keys], dtype=np.int64)[index]
        if rows.excluded is not None:
            row = entry_rows(rows.excluded)
            also = self._admit(rows, row, rows.excluded.values)
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
                    np.bincount(label[self._groups.items(int(key))], minlength=num_clusters)
                    for key in keys
                ]
            ).astype(np.int64)
        counts: NDArray[np.int64] = groups[index]
        if rows.excluded is not None:
            row = entry_rows(rows.excluded)
            counts -= by_row(rows.excluded, self._admit(rows, row, rows.excluded.values))
        return counts

    def refusals(self, rows: EligibleRows, item: Numbers) -> dict[str, Mask]:
        """By form, the (n,) rows for which the form rules out the row's item (n,)."""
        every = np.arange(len(rows), dtype=np.int64)
        found = {} if rows.group is None else self._groups.refusals(rows.group, item)
        if rows.excluded is not None:
            found["exclude"] = holds(rows.excluded, every, item, self.num_items)
        if rows.candidates is not None:
            found["candidates"] = ~holds(rows.candidates, every, item, self.num_items)
        return found

    def faulty_actions(self, table: pa.Table, action: str) -> Iterator[ColumnFault]:
        """Find logged actions outside their row's eligible items, by the form that rules them out.

        Rows whose own columns are bad, or whose action is unknown, are passed over.

        Args:
            action: the column of the actions.
        """
        item = self._catalogue.index_of(table.column(action))
        left = item >= 0
        for fault in self.checks.columns(table, "the table"):
            left &= ~fault.mask
        index = np.flatnonzero(left)
        if index.size == 0:
            return
        rows = self.encode(table.take(pa.array(index)))
        for form, refused in self.refusals(rows, item[index]).items():
            mask = np.zeros(table.num_rows, dtype=bool)
            mask[index[refused]] = True
            if mask.any():
                expected = "an eligible item (the schema's 'eligible')"
                yield ColumnFault(action, self.checks.refusal(form), expected, mask)

    def _admit(self, rows: EligibleRows, row: Numbers, item: Numbers) -> Mask:
        """(m,) whether the attribute values and the time of `row` (m,) admit `item` (m,)."""
        return self._groups.admit(None if rows.group is None else rows.group[row], item)

    def _allowed(self, rows: EligibleRows) -> BagArray:
        """The candidates that the other forms admit."""
        lists = rows.candidates
        assert lists is not None, "the caller checks it"
        row = entry_rows(lists)
        kept = self._admit(rows, row, lists.values)
        if rows.excluded is not None:
            kept &= ~holds(rows.excluded, row, lists.values, self.num_items)
        ends = np.concatenate([[0], np.cumsum(np.bincount(row[kept], minlength=len(lists)))])
        return BagArray(lists.values[kept], ends.astype(np.int64))


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
