"""Types of columns of times that are text, by their first cells."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from offtower.data.formats.cells import TimeForm, time_form
from offtower.data.formats.options import FileFormat
from offtower.data.formats.streams import TextFile
from offtower.data.formats.types import target_type
from offtower.errors import DataError

PEEKED_CELLS = 1000
"""Cells of a column in which the first time is looked for."""


def time_type(
    cells: Sequence[str | None], name: str, file: TextFile, file_format: FileFormat
) -> pa.DataType:
    """Type that a column of times becomes; null where no cell says it.

    Raises:
        DataError: no cell is a time.
    """
    form = first_time_form(cells, name, f"{file.location}, near its first line", file_format)
    target = target_type("time", pa.string(), form, large=False)
    assert target is not None
    return target


def first_time_form(
    cells: Sequence[str | None], name: str, where: str, file_format: FileFormat
) -> TimeForm | None:
    """Form of the first cell that is a time; None where there is no cell."""
    absent = {"", *(file_format.null_words if file_format.trim else ())}
    content = [cell for cell in cells if cell is not None and cell.strip() not in absent]
    for cell in content:
        form = time_form(cell, file_format)
        if form is not None:
            return form
    if content:
        raise DataError(
            f"{where}: column '{name}' is {content[0]!r}, expected a time such as "
            "2026-01-31T10:00:00+01:00 or a number; other forms are read with format.time, such "
            "as '%d.%m.%Y %H:%M'"
        )
    return None
