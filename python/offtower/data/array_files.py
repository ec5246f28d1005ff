"""Arrays in .npy files that are written from front to back, and mapped as one array.

A large array has a file for each part of its rows, so that several processes write it without
sharing a file. Parts begin at page boundaries of their files: several are mapped side by side, and
readers see one contiguous array.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.atomic import replace_file
from offtower.errors import RunError
from offtower.mapping import Mapper

PART_ROWS = 262_144
"""Rows of a part; with any type and width its size is a multiple of 256 KiB."""
_HEADER = 4096
"""Bytes before the first row: a page of most systems; `numpy.load` refuses above 10,000. Where
pages are larger, several parts are read into memory instead of mapped."""
_BLOCK_ROWS = 65_536
_MAP_FIXED = 0x10
"""Of mmap(2), on Linux and macOS."""


@dataclass
class WrittenFile:
    """A file's size and digest, computed from what was written.

    Damage between writing and a later reading is found, which a digest of the file as it is read
    back would miss.
    """

    bytes: int = 0
    sha256: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """As `checksums.describe_files` has them."""
        return {"bytes": self.bytes, "sha256": self.sha256}


@contextmanager
def array_writer(
    path: Path, dtype: Any, shape: tuple[int, ...], written: WrittenFile
) -> Iterator[Callable[[NDArray[Any]], None]]:
    """Yield a function that appends rows to a .npy file, which appears when all are written.

    Raises:
        RunError: the rows do not add up to the shape.
    """
    rows, digest = 0, hashlib.sha256()
    with replace_file(path) as temporary, open(temporary, "wb") as file:

        def write(content: bytes | memoryview) -> None:
            written.bytes += len(content)
            digest.update(content)
            file.write(content)

        def append(block: NDArray[Any]) -> None:
            nonlocal rows
            rows += len(block)
            if block.size:
                write(np.ascontiguousarray(block, dtype=dtype).data.cast("B"))

        write(_header(np.dtype(dtype), shape))
        yield append
        if rows != shape[0]:
            raise RunError(f"'{path}' got {rows:,} rows, expected {shape[0]:,}")
    written.sha256 = digest.hexdigest()


def part_names(name: str, rows: int) -> list[str]:
    """Names of the files of an array: `name`.npy for one part, else with the part's number."""
    count = max(1, -(-rows // PART_ROWS))
    return [f"{name}.npy"] if count == 1 else [f"{name}-{k:05d}.npy" for k in range(count)]


def part_rows(rows: int) -> list[range]:
    """Rows of each part."""
    starts = range(0, max(rows, 1), PART_ROWS)
    return [range(start, min(start + PART_ROWS, rows)) for start in starts]


@dataclass(frozen=True)
class WrittenPart:
    """A part of an array that was written."""

    file: str
    rows: int
    written: WrittenFile


def write_array(
    directory: Path,
    name: str,
    dtype: Any,
    shape: tuple[int, int],
    block: Callable[[range], NDArray[Any]],
    mapper: Mapper,
) -> dict[str, WrittenFile]:
    """Write an array as parts; return what was written, by file name.

    Args:
        block: returns some consecutive rows.
        mapper: writes the parts, to a directory that its workers see.
    """
    parts = list(zip(part_names(name, shape[0]), part_rows(shape[0]), strict=True))
    write = partial(_write_part, directory.resolve(), np.dtype(dtype), shape[1], block)
    return {one.file: one.written for one in mapper.map(write, parts, f"writing {name}")}


def _write_part(
    directory: Path,
    dtype: np.dtype[Any],
    width: int,
    block: Callable[[range], NDArray[Any]],
    part: tuple[str, range],
) -> WrittenPart:
    """Write the file of a part (idempotent)."""
    file, rows = part
    written = WrittenFile()
    with array_writer(directory / file, dtype, (len(rows), width), written) as append:
        for first in range(rows.start, rows.stop, _BLOCK_ROWS):
            append(block(range(first, min(first + _BLOCK_ROWS, rows.stop))))
    return WrittenPart(file, len(rows), written)


def map_array(paths: Sequence[Path]) -> NDArray[Any]:
    """Map the parts of an array, read-only, as one contiguous array.

    Raises:
        OSError, ValueError: a file cannot be read, or the parts do not belong together.
    """
    parts: list[Any] = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    first: NDArray[Any] = parts[0]
    if len(parts) == 1:
        return first
    if any(p.dtype != first.dtype or p.shape[1:] != first.shape[1:] for p in parts):
        raise ValueError(f"'{paths[0]}' and the other parts differ in dtype or width")
    aligned = all(part.nbytes % mmap.PAGESIZE == 0 for part in parts[:-1])
    if not aligned or any(part.offset % mmap.PAGESIZE for part in parts):
        return np.concatenate(parts)
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    whole = _mapped_together(
        [(p, part.offset, part.nbytes) for p, part in zip(paths, parts, strict=True)]
    )
    mapped: NDArray[Any] = whole.view(first.dtype).reshape(shape)
    return mapped


def _mapped_together(pieces: Sequence[tuple[Path, int, int]]) -> NDArray[np.uint8]:
    """Map (file, offset, bytes) side by side: a reserved range of addresses, in which each file
    replaces its pages (mmap(2) with MAP_FIXED)."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,
    ]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    total = sum(size for _, _, size in pieces)

    def map_at(address: int | None, size: int, flags: int, file: int, offset: int) -> int:
        access = mmap.PROT_READ
        found = library.mmap(address, size, access, flags, file, offset)
        if found is None or found == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map {size:,} bytes")
        return int(found)

    base = map_at(None, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    memory = (ctypes.c_ubyte * total).from_address(base)
    weakref.finalize(memory, library.munmap, base, total)
    at = base
    for path, offset, size in pieces:
        with open(path, "rb") as file:
            map_at(at, size, mmap.MAP_SHARED | _MAP_FIXED, file.fileno(), offset)
        at += size
    whole: NDArray[np.uint8] = np.ctypeslib.as_array(memory)
    whole.flags.writeable = False
    return whole


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file of version 2, padded with spaces to `_HEADER` bytes."""
    content = io.BytesIO()
    description = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_2_0(content, description)
    start, text = content.getvalue()[:8], content.getvalue()[12:].rstrip(b" \n")
    length = _HEADER - 12
    return start + length.to_bytes(4, "little") + text.ljust(length - 1) + b"\n"
