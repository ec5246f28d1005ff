"""Quarantine files: bad rows with all their columns and the reason, in Parquet."""

from __future__ import annotations

import zlib

import pyarrow as pa
import pyarrow.parquet as pq

from offtower.data.location import AnyPath, Location
from offtower.data.output import new_file

REASON = "_reason"
"""Column with what is wrong; `_row` is the row's number in the whole log."""

ROW = "_row"


def write_quarantine(
    directory: AnyPath,
    rows: pa.Table,
    numbers: list[int],
    reasons: list[str],
    source: str,
    first: int,
) -> Location:
    """Write the bad rows of one table, always to the same file.

    Args:
        rows: the bad rows, with their columns as read.
        numbers, reasons: of each row.
        source: the file that they come from; part of the name, since logs may share a folder.
        first: number of the table's first row in the whole log.
    """
    aside = rows.append_column(ROW, pa.array(numbers, pa.int64()))
    aside = aside.append_column(REASON, pa.array(reasons, pa.string()))
    path = (
        Location.of(directory) / f"rows-from-{first:012d}-{zlib.crc32(source.encode()):08x}.parquet"
    )
    with new_file(path) as temporary:
        pq.write_table(aside, temporary, write_page_checksum=True)
    return path
