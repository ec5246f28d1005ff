"""An open file of a source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import pyarrow as pa

from offtower.data.formats.bad_cells import BadCells
from offtower.data.formats.kinds import ColumnKind
from offtower.data.formats.options import FileFormat
from offtower.data.formats.streams import TextFile
from offtower.data.location import Location
from offtower.errors import DataError

RawBatch: TypeAlias = tuple[pa.RecordBatch, tuple[BadCells, ...]]
"""Rows as a file types them, and rows or cells that could not be read."""


@dataclass(frozen=True)
class SourceFile(ABC):
    """An open file; each format reads its rows.

    Attributes:
        location: where it is.
        name: path below the source; empty for the source itself.
        kinds: of the columns to read.
        types: that these become, by this file alone; null where it does not say.
        partition: columns whose value the file's folders say.
        row_groups: (number, rows) of each; None of a file without them.
    """

    location: Location
    name: str
    kinds: Mapping[str, ColumnKind]
    types: Mapping[str, pa.DataType]
    partition: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def row_groups(self) -> list[tuple[int, int]] | None:
        return None

    @property
    def text(self) -> TextFile | None:
        """The file where it is text."""
        return None

    def subset(self, groups: Sequence[int]) -> SourceFile:
        """Some row groups of a file that has them."""
        raise NotImplementedError(f"a {type(self).__name__} has no row groups")

    def batches(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        """Rows of the columns. Errors are those of pyarrow."""
        inside = [name for name in names if name not in self.partition]
        for batch, bad in self._read(inside, most_rows):
            if len(inside) < len(names):
                batch = self._with_partition(batch, names)
            yield batch, bad

    @abstractmethod
    def _read(self, names: Sequence[str], most_rows: int) -> Iterator[RawBatch]:
        """Rows of columns that stand in the file."""

    def _with_partition(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        n = batch.num_rows
        arrays = [
            pa.array([self.partition[name]], pa.string()).take(pa.array([0] * n, pa.int32()))
            if name in self.partition
            else batch.column(name)
            for name in names
        ]
        return pa.RecordBatch.from_arrays(arrays, list(names))


def check_columns(
    location: Location,
    names: Sequence[str],
    kinds: Mapping[str, ColumnKind],
    partition: Mapping[str, str | None],
    file_format: FileFormat,
) -> None:
    """Check that a file and its folders have each column once.

    Raises:
        DataError: one is missing or there twice.
    """
    for name in kinds:
        if names.count(name) > 1:
            raise DataError(f"'{location}' has two columns '{name}'; rename one")
    missing = [name for name in kinds if name not in names and name not in partition]
    if not missing:
        return
    hint = ""
    stripped = [name.strip() for name in names]
    if all(name in stripped for name in missing):
        hint = ". Spaces stand around its names: set format.trim: true"
    elif len(names) == 1:
        for mark in (";", "\t", "|", ","):
            if mark in names[0] and mark != file_format.delimiter:
                hint = f". Its cells seem to be separated otherwise: set format.delimiter: {mark!r}"
                break
    raise DataError(
        f"'{location}' has no column {', '.join(repr(m) for m in missing)}; "
        f"it has {', '.join(names)}{hint}"
    )
