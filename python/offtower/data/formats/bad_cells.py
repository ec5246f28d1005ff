"""Cells of source files that could not be read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.vectors import Mask


@dataclass(frozen=True)
class BadCells:
    """Cells of a column that are no value of its kind, and null in the tables.

    Attributes:
        column: its name; empty for rows that are none.
        rows: (m,) numbers of their rows, increasing.
        values: (m,) the cells as they stand in the file.
        problem: in a word or two.
        expected: a value of the kind, and the key of `format` that reads other forms.
    """

    column: str
    rows: NDArray[np.int64]
    values: pa.Array
    problem: str
    expected: str

    @classmethod
    def of(cls, column: str, mask: Mask, values: pa.Array, why: tuple[str, str]) -> BadCells:
        """Those of a mask over the (n,) values of a column."""
        rows = np.flatnonzero(mask)
        return cls(column, rows, values.take(pa.array(rows)), *why)

    def between(self, first: int, last: int) -> BadCells:
        """Those in rows first..last-1, whose numbers become 0..last-first-1."""
        start, stop = np.searchsorted(self.rows, (first, last))
        return replace(
            self, rows=self.rows[start:stop] - first, values=self.values[int(start) : int(stop)]
        )

    def describe(self) -> str:
        """What is wrong in the first row."""
        value = shown(self.values[0].as_py())
        what = f"column '{self.column}' is {value}" if self.column else f"the row is {value}"
        return f"{what} ({self.problem}), expected {self.expected}"


def shown(value: Any) -> str:
    """A value in a message, at most 80 characters long."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
