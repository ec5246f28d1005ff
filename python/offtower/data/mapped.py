"""Encoded features in memory-mapped files.

<directory>/features.json   <number>.npy (dense)   <number>.values.npy, <number>.offsets.npy (bag)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.checksums import read_checked_json, write_checked_json
from offtower.data.features import BagArray, FeatureArrays

_FILE = "features.json"


def write_mapped(directory: Path, parts: Iterable[FeatureArrays], num_rows: int) -> None:
    """Write features that arrive in parts, in the memory of one part.

    Args:
        directory: an empty folder.
        parts: all rows, in order, with the same names.
        num_rows: rows of all parts.
    """
    writers: dict[str, _Dense | _Bag] = {}
    for part in parts:
        for number, (name, value) in enumerate(part.items()):
            if name not in writers:
                writers[name] = (
                    _Bag(directory, number, value, num_rows)
                    if isinstance(value, BagArray)
                    else _Dense(directory, number, value, num_rows)
                )
            writers[name].add(value)
    for writer in writers.values():
        writer.close()
    content = {
        name: {"number": number, "bag": isinstance(writer, _Bag)}
        for number, (name, writer) in enumerate(writers.items())
    }
    write_checked_json(directory / _FILE, {"features": content})


def open_mapped(directory: Path) -> FeatureArrays:
    """Open the features as read-only memory maps."""
    arrays: FeatureArrays = {}
    for name, facts in read_checked_json(directory / _FILE)["features"].items():
        number = facts["number"]
        if facts["bag"]:
            arrays[name] = BagArray(
                _map(directory / f"{number}.values.npy"), _map(directory / f"{number}.offsets.npy")
            )
        else:
            arrays[name] = _map(directory / f"{number}.npy")
    return arrays


def slice_arrays(arrays: FeatureArrays, start: int, stop: int) -> FeatureArrays:
    """Rows start..stop-1, as views but for the offsets of bags."""
    result: FeatureArrays = {}
    for name, value in arrays.items():
        if isinstance(value, BagArray):
            offsets = value.offsets[start : stop + 1]
            values = value.values[offsets[0] : offsets[-1]]
            result[name] = BagArray(values, offsets - offsets[0])
        else:
            result[name] = value[start:stop]
    return result


def _map(path: Path) -> NDArray[Any]:
    # As a plain array, whose slices are cheaper than those of a memmap.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


class _Dense:
    def __init__(self, directory: Path, number: int, like: Any, num_rows: int) -> None:
        self._array = np.lib.format.open_memmap(
            directory / f"{number}.npy",
            mode="w+",
            dtype=like.dtype,
            shape=(num_rows, *like.shape[1:]),
        )
        self._next = 0

    def add(self, value: Any) -> None:
        self._array[self._next : self._next + len(value)] = value
        self._next += len(value)

    def close(self) -> None:
        self._array.flush()


class _Bag:
    """Appends values of unknown number to a raw file, and writes the .npy header at the end."""

    _HEADER = 128

    def __init__(self, directory: Path, number: int, like: BagArray, num_rows: int) -> None:
        self._offsets = _Dense(directory, number, like.offsets, num_rows + 1)
        (directory / f"{number}.npy").rename(directory / f"{number}.offsets.npy")
        self._path = directory / f"{number}.values.npy"
        self._file = open(self._path, "wb")  # noqa: SIM115
        self._file.write(b"\0" * self._HEADER)
        self._dtype = like.values.dtype
        self._count = 0
        self._offsets.add(np.zeros(1, dtype=like.offsets.dtype))

    def add(self, value: Any) -> None:
        self._offsets.add(value.offsets[1:] + self._count)
        self._file.write(np.ascontiguousarray(value.values).tobytes())
        self._count += len(value.values)

    def close(self) -> None:
        self._offsets.close()
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count,)}
        text = repr(header).encode("latin1")
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + (self._HEADER - 10).to_bytes(2, "little"))
        self._file.write(text.ljust(self._HEADER - 11) + b"\n")
        self._file.close()
