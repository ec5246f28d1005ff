"""Parquet and Arrow files: their columns and rows, by pyarrow."""

from __future__ import annotations

from typing import Any

import pyarrow.dataset as ds
from pyarrow import fs

from offtower.data.location import Location

_FORMATS: dict[str, ds.FileFormat] = {}


def open_fragment(location: Location, kind: str) -> Any:
    """A file as a fragment of a dataset; times of int96 become microseconds, which hold every year.

    Raises:
        pa.ArrowInvalid, OSError: the file cannot be read.
    """
    if kind not in _FORMATS:
        options = ds.ParquetReadOptions(coerce_int96_timestamp_unit="us")
        _FORMATS["parquet"] = ds.ParquetFileFormat(read_options=options)
        _FORMATS["arrow"] = ds.IpcFileFormat()
    if location.local is not None:
        path, filesystem = str(location.local), fs.LocalFileSystem()
    else:
        path, filesystem = location.path, location.filesystem
    return _FORMATS[kind].make_fragment(path, filesystem)


def row_groups(fragment: Any) -> list[tuple[int, int]] | None:
    """(number, rows) of each row group; None of a file without them."""
    if not isinstance(fragment, ds.ParquetFileFragment):
        return None
    return [(group.id, group.num_rows) for group in fragment.row_groups]


def exceeds_int64(fragment: Any, name: str) -> bool:
    """Whether a column of unsigned integers may hold one of 2^63 or more, by its statistics."""
    if not isinstance(fragment, ds.ParquetFileFragment):
        return True
    for group in fragment.row_groups:
        bounds = (group.statistics or {}).get(name)
        if group.num_rows and (bounds is None or int(bounds["max"]) >= 2**63):
            return True
    return False
