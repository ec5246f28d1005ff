"""Checks of the columns that say which items are eligible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from offtower.data.catalogue import Catalogue
from offtower.data.columns import is_category, is_list, is_text, null_mask
from offtower.data.eligible_forms import time_kind
from offtower.data.eligible_groups import ItemGroups, Mask
from offtower.data.eligible_schema import EligibleSchema
from offtower.data.item_lists import item_lists
from offtower.errors import DataError


class ColumnFault(NamedTuple):
    """Rows of a table whose value of a column is bad in the same way."""

    column: str
    problem: str
    expected: str
    mask: Mask
    """(n,)."""


class EligibleChecks:
    """Checks columns of a log, or of contexts, against the section `eligible`.

    Args:
        section: of the log schema.
        groups: its attributes and interval.
        catalogue: finds item numbers.
    """

    def __init__(self, section: EligibleSchema, groups: ItemGroups, catalogue: Catalogue) -> None:
        self._section, self._groups, self._catalogue = section, groups, catalogue

    def types(self, arrow: pa.Schema, file: str) -> None:
        """Check that the columns are there and of the right types.

        Raises:
            DataError: one is missing or of a wrong type.
        """
        groups = self._groups
        names = list(self._section.log_columns)
        if groups.interval is not None and groups.timestamp is not None:
            names.append(groups.timestamp)
        for name in names:
            if name not in arrow.names:
                raise DataError(
                    f"{file} has no column '{name}', which the section 'eligible' of the log "
                    f"schema reads; it has {', '.join(arrow.names)}"
                )
        for attribute in groups.attributes:
            kind = arrow.field(attribute.form.context).type
            if not is_category(kind) or is_text(kind) != attribute.text:
                wanted = "text" if attribute.text else "integers"
                raise DataError(
                    f"{file}: column '{attribute.form.context}' holds {kind}, expected {wanted}, "
                    f"as the catalogue's column '{attribute.form.item}' has"
                )
        for name in self._section.lists:
            self._list_type(name, arrow.field(name).type, file)
        if groups.interval is not None and groups.timestamp is not None:
            kind = arrow.field(groups.timestamp).type
            found = time_kind(kind, f"{file}: column '{groups.timestamp}'")
            if found != groups.interval.kind:
                raise DataError(
                    f"{file}: column '{groups.timestamp}' holds {found}, but the catalogue's "
                    f"columns of eligible.interval hold {groups.interval.kind}; write both alike"
                )

    def columns(self, table: pa.Table, file: str) -> Iterator[ColumnFault]:
        """Find bad values of the columns.

        Raises:
            DataError: as for `types`.
        """
        self.types(table.schema, file)
        groups = self._groups
        for attribute in groups.attributes:
            name = attribute.form.context
            column = table.column(name)
            null = null_mask(column)
            expected = f"a value that the column '{attribute.form.item}' of some item has"
            unknown = (attribute.number(column) == attribute.cardinality - 1) & ~null
            yield from _found(name, expected, {"null": null, "a value of no item": unknown})
        if groups.interval is not None:
            assert groups.timestamp is not None, "the schema checks it"
            null = null_mask(table.column(groups.timestamp))
            yield from _found(groups.timestamp, "a time", {"null": null})
        if self._section.candidates is not None:
            name = self._section.candidates.column
            column = table.column(name)
            lists, unknown_ids = item_lists(column, self._catalogue)
            null = null_mask(column)
            unknown = unknown_ids > 0
            empty = (np.diff(lists.offsets) == 0) & ~null & ~unknown
            expected = f"a list of ids of the catalogue's {self._catalogue.num_items:,} items"
            problems = {"null": null, "with an unknown item": unknown, "empty": empty}
            yield from _found(name, expected, problems)

    def unknown_excluded(self, table: pa.Table) -> tuple[int, int]:
        """Numbers of excluded ids that the catalogue does not have, and of all excluded ids."""
        if self._section.exclude is None:
            return 0, 0
        column = table.column(self._section.exclude.column)
        lists, unknown = item_lists(column, self._catalogue)
        return int(unknown.sum()), int(lists.values.size + unknown.sum())

    def refusal(self, form: str) -> str:
        """Say how a form of `EligibleItems.refusals` rules out an item."""
        section = self._section
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

    def forms(self) -> str:
        """Name the forms."""
        section = self._section
        names = [f"attribute '{form.item}'" for form in section.attribute]
        names += [n for n in ("interval", "exclude", "candidates") if getattr(section, n)]
        return ", ".join(names)

    def _list_type(self, name: str, kind: pa.DataType, file: str) -> None:
        values = kind.value_type if is_list(kind) else None
        if values is None or pa.types.is_null(values):
            fits = values is not None
        else:
            fits = is_category(values) and is_text(values) == self._catalogue.text_ids
        if not fits:
            wanted = "text" if self._catalogue.text_ids else "integers"
            raise DataError(
                f"{file}: column '{name}' holds {kind}, expected lists of {wanted}, as the item "
                "ids of the catalogue are"
            )


def _found(column: str, expected: str, problems: dict[str, Mask]) -> Iterator[ColumnFault]:
    for problem, mask in problems.items():
        if mask.any():
            yield ColumnFault(column, problem, expected, mask)
