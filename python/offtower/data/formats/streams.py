"""Text files as streams of UTF-8, and the lines of their rows."""

from __future__ import annotations

import csv
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from offtower.data.formats.options import CODECS, ENDINGS, FileFormat, FileType
from offtower.data.location import Location

_BLOCK_BYTES = 4 * 2**20
_MAX_CELL = 2**31 - 1


@dataclass(frozen=True)
class TextFile:
    """A text file and its format.

    Attributes:
        location: where it is.
        kind: csv, tsv or jsonl.
    """

    location: Location
    kind: FileType
    file_format: FileFormat

    def open(self) -> pa.NativeFile:
        """Open the file as a stream of UTF-8, decompressed. Errors are those of pyarrow."""
        place = self.location
        if place.local is not None:
            stream: pa.NativeFile = pa.OSFile(str(place.local))
        else:
            assert place.filesystem is not None
            stream = place.filesystem.open_input_stream(place.path, compression=None)
        codec = CODECS.get(place.suffix.lower())
        if codec is not None:
            stream = pa.CompressedInputStream(stream, codec)
        encoding = self.file_format.encoding
        if encoding.lower().replace("_", "-") not in ("utf-8", "utf8"):
            stream = pa.transcoding_input_stream(stream, encoding, "utf-8")
        return stream

    def lines(self, rows: Sequence[int]) -> list[int | None]:
        """Numbers of the lines, from 1, where rows begin; None where they cannot be counted.

        The file is read up to them, on from the rows that were asked for last.

        Args:
            rows: numbers of rows in the file, from 0 after the header, increasing.
        """
        header = 0 if self.kind == "jsonl" else 1
        with _LOCK:
            counter = _COUNTERS.pop(self, None)
            if counter is None or (rows and counter.row > rows[0] + header):
                counter = _LineCounter(self._row_lines())
            _COUNTERS[self] = counter
            while len(_COUNTERS) > _MOST_COUNTERS:
                _COUNTERS.popitem(last=False)
            return [counter.line_of(row + header) for row in rows]

    def _row_lines(self) -> Iterator[int]:
        """The line where each row begins, the header's first; empty lines are no rows."""
        options = self.file_format
        if self.kind == "jsonl" or options.quote is None:
            for number, line in enumerate(self._text_lines(), 1):
                if line.strip("\r\n") and (self.kind != "jsonl" or line.strip()):
                    yield number
            return
        first = 1
        reader = self._csv_reader(strict=False)
        for cells in reader:
            if cells:
                yield first
            first = reader.line_num + 1

    def unclosed_quote(self) -> int | None:
        """The line of the row with a quote that is never closed; None where there is none."""
        first = 1
        reader = self._csv_reader(strict=True)
        try:
            for _ in reader:
                first = reader.line_num + 1
        except csv.Error as error:
            return first if "end of data" in str(error) else None
        return None

    def _csv_reader(self, *, strict: bool) -> Any:
        options = self.file_format
        csv.field_size_limit(_MAX_CELL)
        return csv.reader(
            self._text_lines(),
            delimiter=options.delimiter_of(self.kind),
            quotechar=options.quote,
            escapechar=options.escape,
            strict=strict,
        )

    def _text_lines(self) -> Iterator[str]:
        with self.open() as stream:
            rest = b""
            while block := stream.read(_BLOCK_BYTES):
                lines = (rest + block).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    yield line.decode("utf-8", "replace") + "\n"
            if rest:
                yield rest.decode("utf-8", "replace")


class _LineCounter:
    """The lines of rows, found in one pass."""

    def __init__(self, lines: Iterator[int]) -> None:
        self._lines = enumerate(lines)
        self.row = -1
        self._line: int | None = None

    def line_of(self, row: int) -> int | None:
        try:
            while self.row < row:
                self.row, self._line = next(self._lines)
        except (StopIteration, csv.Error, pa.ArrowInvalid, OSError):
            self._line = None
        return self._line if self.row == row else None


_MOST_COUNTERS = 8
_COUNTERS: OrderedDict[TextFile, _LineCounter] = OrderedDict()
_LOCK = threading.Lock()


def file_type(location: Location, file_format: FileFormat) -> FileType | None:
    """Type of a file by the format or its ending; None where neither says it."""
    if file_format.type is not None:
        return file_format.type
    name = location.name.lower()
    for ending in CODECS:
        name = name.removesuffix(ending)
    kind = ENDINGS.get("." + name.rpartition(".")[2])
    text = kind in ("csv", "tsv", "jsonl")
    return kind if text or name == location.name.lower() else None
