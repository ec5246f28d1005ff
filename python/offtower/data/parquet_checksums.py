"""Checksums of Parquet files: of each column chunk and of the footer, verified as they are read.

Parquet's own page checksums cover neither page headers nor the footer. offtower writes them for
other readers, and keeps in the folder's manifest the CRC-32 of every column chunk (headers and
dictionary pages included) and of the footer, and the sha256 of the file. Reading a row group
computes the CRC-32 of the bytes that are decoded anyway, so a file is read once.
"""

from __future__ import annotations

import io
import mmap
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError)
"""What pyarrow raises on files that are damaged, or that a store does not give."""
_TAIL = 8
"""Bytes behind the footer: its length and the magic."""
_GAP = 64 * 1024
"""Bytes between two column chunks that are read rather than requested around."""


@dataclass(frozen=True)
class Checksums:
    """Checksums of one file.

    Attributes:
        sha256: of the whole file, hexadecimal.
        footer_bytes: length of the footer, with the 8 bytes behind it.
        footer: CRC-32 of these bytes.
        chunks: CRC-32 of the column chunks, 4 bytes each (big-endian), by row group and column.
    """

    sha256: str
    footer_bytes: int
    footer: int
    chunks: bytes

    @classmethod
    def of(cls, path: Path) -> Checksums:
        """Compute the checksums of a file that was just written."""
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata = pq.read_metadata(path)
            footer_bytes = int.from_bytes(data[-_TAIL : -_TAIL + 4], "little") + _TAIL
            with memoryview(data) as view:
                chunks = b"".join(
                    zlib.crc32(view[start : start + length]).to_bytes(4, "big")
                    for group in range(metadata.num_row_groups)
                    for start, length in _chunks(metadata, group, range(metadata.num_columns))
                )
                return cls(
                    sha256(view).hexdigest(), footer_bytes, zlib.crc32(view[-footer_bytes:]), chunks
                )

    def to_dict(self) -> dict[str, Any]:
        return {
            "sha256": self.sha256,
            "footer": [self.footer_bytes, f"{self.footer:08x}"],
            "crc32": self.chunks.hex(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Checksums:
        footer_bytes, footer = content["footer"]
        return cls(
            content["sha256"], footer_bytes, int(footer, 16), bytes.fromhex(content["crc32"])
        )

    def read_footer(self, source: pa.NativeFile) -> pq.FileMetaData:
        """Read and verify the footer of an open file.

        Raises:
            OSError: it does not match its checksum.
        """
        tail = source.read_at(self.footer_bytes, max(0, source.size() - self.footer_bytes))
        if zlib.crc32(tail) != self.footer:
            raise OSError("the footer does not match its checksum")
        return pq.read_metadata(pa.BufferReader(tail))

    def read_row_group(
        self, source: pa.NativeFile, metadata: pq.FileMetaData, group: int, columns: Sequence[str]
    ) -> pa.Table:
        """Read some columns of a row group of an open file, and verify their bytes.

        Raises:
            OSError: a column chunk does not match its checksum.
        """
        leaves = _leaves(metadata, columns)
        chunks = _chunks(metadata, group, leaves)
        sparse = _SparseFile(source, chunks)
        for leaf, (start, length) in zip(leaves, chunks, strict=True):
            at = 4 * (group * metadata.num_columns + leaf)
            if zlib.crc32(sparse.view(start, length)) != int.from_bytes(
                self.chunks[at : at + 4], "big"
            ):
                name = metadata.schema.column(leaf).path
                raise OSError(f"column '{name}' does not match its checksum")
        with pq.ParquetFile(pa.PythonFile(sparse, mode="r"), metadata=metadata) as opened:
            return opened.read_row_group(group, columns=list(columns))


def read_footer_bytes(source: pa.NativeFile) -> tuple[pq.FileMetaData, bytes]:
    """Footer of an open file, and its bytes with the 8 behind it.

    Raises:
        OSError, ArrowInvalid: it is not Parquet, or truncated.
    """
    size = source.size()
    tail = source.read_at(min(size, _GAP), max(0, size - _GAP))
    length = int.from_bytes(tail[-_TAIL:-4], "little") + _TAIL
    if len(tail) < length <= size:
        tail = source.read_at(length, size - length)
    tail = tail[-length:]
    return pq.read_metadata(pa.BufferReader(tail)), tail


def open_parquet(source: Any, **options: Any) -> pq.ParquetFile:
    """A file without checksums of offtower; those of its pages are verified where it has them."""
    return pq.ParquetFile(source, page_checksum_verification=True, **options)


def _leaves(metadata: pq.FileMetaData, columns: Sequence[str]) -> list[int]:
    """Numbers of the leaf columns below the named ones; nested ones have several."""
    names = tuple(f"{name}." for name in columns)
    paths = (metadata.schema.column(leaf).path for leaf in range(metadata.num_columns))
    return [leaf for leaf, path in enumerate(paths) if f"{path}.".startswith(names)]


def _chunks(metadata: pq.FileMetaData, group: int, leaves: Sequence[int]) -> list[tuple[int, int]]:
    """(start, length) of column chunks in the file."""
    row_group = metadata.row_group(group)
    found = []
    for leaf in leaves:
        chunk = row_group.column(leaf)
        start = chunk.data_page_offset
        if chunk.has_dictionary_page:
            start = min(start, chunk.dictionary_page_offset)
        found.append((start, chunk.total_compressed_size))
    return found


class _SparseFile(io.RawIOBase):
    """Some ranges of a file in memory, at their own offsets."""

    def __init__(self, source: pa.NativeFile, ranges: Sequence[tuple[int, int]]) -> None:
        self._size, self._at = source.size(), 0
        self._starts: list[int] = []
        self._blocks: list[memoryview] = []
        for start, length in _merged(ranges):
            block = memoryview(source.read_at(length, start))
            if len(block) != length:
                raise OSError(f"{len(block)} of {length} bytes at {start}: the file is truncated")
            self._starts.append(start)
            self._blocks.append(block)

    def view(self, start: int, length: int) -> memoryview:
        """Bytes of one of the ranges."""
        number = bisect_right(self._starts, start) - 1
        offset = start - self._starts[number]
        return self._blocks[number][offset : offset + length]

    def read(self, size: int = -1) -> memoryview:
        found = self.view(self._at, size)
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, joined where they are close."""
    joined: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if joined and start - sum(joined[-1]) <= _GAP:
            first, _ = joined[-1]
            joined[-1] = (first, start + length - first)
        else:
            joined.append((start, length))
    return joined
