"""Rows of CSV and TSV files, read by pyarrow with every cell as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc_csv

from offtower.data.formats.bad_cells import BadCells
from offtower.data.formats.streams import TextFile
from offtower.errors import DataError

_BLOCK_BYTES = 4 * 2**20
_PEEK_BYTES = 2**16
_MAX_BLOCK_BYTES = 2**30


@dataclass
class _Misfits:
    """Rows with too few or too many cells, as the parser reports them."""

    skip: bool
    rows: dict[int, tuple[int, int, str]] = field(default_factory=dict)

    def __call__(self, row: pc_csv.InvalidRow) -> str:
        if not self.skip:
            return "error"
        # pyarrow counts the header as row 1.
        self.rows[row.number - 2] = (row.actual_columns, row.expected_columns, row.text)
        return "skip"


def read_header(file: TextFile) -> tuple[list[str], pa.RecordBatch | None]:
    """Names of the columns as they stand, and the first rows as bytes; None without rows.

    Raises:
        pa.ArrowInvalid: the file is empty.
        UnicodeDecodeError: the names are not UTF-8.
    """
    size = _PEEK_BYTES
    while True:
        try:
            with file.open() as stream:
                names = list(_reader(stream, file, size, None, _Misfits(skip=True)).schema.names)
            with file.open() as stream:
                reader = _reader(stream, file, size, names, _Misfits(skip=True))
                return names, next(iter(reader), None)
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error) or size >= _MAX_BLOCK_BYTES:
                raise
            size *= 16


def read_batches(
    file: TextFile, names: Sequence[str]
) -> Iterator[tuple[pa.RecordBatch, BadCells | None]]:
    """Rows as they stand, as bytes; a row with another number of cells is null in every column.

    Args:
        names: columns to read, as the header has them.

    Raises:
        pa.ArrowInvalid: the file cannot be split into rows.
    """
    done, size, skip = 0, _BLOCK_BYTES, False
    while True:
        at = 0
        try:
            for batch, bad in _whole(file, names, size, _Misfits(skip)):
                rows = batch.num_rows
                first = min(max(done - at, 0), rows)
                at += rows
                if first < rows:
                    done = at
                    yield batch.slice(first), None if bad is None else bad.between(first, rows)
            return
        except pa.ArrowInvalid as error:
            if "straddling" in str(error) and size < _MAX_BLOCK_BYTES:
                size *= 16
            elif "Expected" in str(error) and not skip:
                # Rows have numbers only in one thread, which most files do not need.
                skip = True
            else:
                raise


def _whole(
    file: TextFile, names: Sequence[str], size: int, misfits: _Misfits
) -> Iterator[tuple[pa.RecordBatch, BadCells | None]]:
    row = 0
    with file.open() as stream:
        counted = _QuoteCounter(stream, file.file_format.quote)
        for batch in _reader(counted, file, size, names, misfits):
            whole, bad = _with_misfits(batch, row, misfits)
            row += whole.num_rows
            if whole.num_rows:
                yield whole, bad
    if counted.odd:
        _check_quotes(file)
    if misfits.rows:
        # Those after the last row: one null row ends the batch, and is cut off again.
        last = pa.RecordBatch.from_arrays([pa.nulls(1, pa.binary()) for _ in names], list(names))
        whole, bad = _with_misfits(last, row, misfits)
        assert bad is not None
        yield whole.slice(0, whole.num_rows - 1), bad


class _QuoteCounter:
    """A stream, and whether an odd number of quotes was read from it."""

    closed = False

    def __init__(self, stream: pa.NativeFile, quote: str | None) -> None:
        self._stream, self._quote = stream, None if quote is None else quote.encode()
        self.odd = False

    def read(self, size: int = -1) -> bytes:
        block: bytes = self._stream.read(size)
        if self._quote is not None and block.count(self._quote) % 2:
            self.odd = not self.odd
        return block


def _check_quotes(file: TextFile) -> None:
    """Refuse a file whose last cell begins with a quote that is never closed.

    pyarrow takes the rest of the file for that cell, and would drop its rows.
    """
    line = file.unclosed_quote()
    if line is not None:
        raise DataError(
            f"'{file.location}', line {line}: a quote is opened and never closed, so that the rest "
            "of the file is one cell. Close or double it, or set format.quote: null if quotes are "
            "part of the values"
        )


def _with_misfits(
    batch: pa.RecordBatch, first: int, misfits: _Misfits
) -> tuple[pa.RecordBatch, BadCells | None]:
    """Insert the misfits that stand before the batch's last row; batches are the same whenever the
    file is read, since those after it go to the next one."""
    places: list[int] = []
    end = first + batch.num_rows
    for row in sorted(misfits.rows):
        if row >= end:
            break
        places.append(row - first)
        end += 1
    if not places:
        return batch, None
    found = [misfits.rows.pop(first + place) for place in places]
    n = batch.num_rows + len(places)
    mask = np.zeros(n, dtype=bool)
    mask[places] = True
    index = np.cumsum(~mask) - 1
    whole = batch.take(pa.array(index, pa.int64(), mask=mask))
    actual, expected, _ = found[0]
    texts = pa.array([text for _, _, text in found], pa.string())
    why = (f"{actual} cells", f"{expected} cells, as the header has")
    return whole, BadCells("", np.asarray(places, dtype=np.int64), texts, *why)


def _reader(
    stream: pa.NativeFile | _QuoteCounter,
    file: TextFile,
    size: int,
    names: Sequence[str] | None,
    misfits: _Misfits,
) -> pc_csv.CSVStreamingReader:
    options = file.file_format
    chosen = [] if names is None else list(names)
    return pc_csv.open_csv(
        stream,
        read_options=pc_csv.ReadOptions(block_size=size, use_threads=not misfits.skip),
        parse_options=pc_csv.ParseOptions(
            delimiter=options.delimiter_of(file.kind),
            quote_char=options.quote or False,
            double_quote=options.quote is not None,
            escape_char=options.escape or False,
            newlines_in_values=True,
            invalid_row_handler=misfits,
        ),
        convert_options=pc_csv.ConvertOptions(
            check_utf8=False,
            column_types=dict.fromkeys(chosen, pa.binary()),
            include_columns=chosen or None,
            null_values=list(options.null_words),
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
