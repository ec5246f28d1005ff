"""Encoded features in memory-mapped files.

<directory>/features.json   <number>.npy (dense)   <number>.values.npy, <number>.offsets.npy (bag)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.checksums import checked_directory, read_json, verify_directory, write_checked_json
from offtower.data.features import BagArray, FeatureArrays
from offtower.errors import RunError

_FILE = "features.json"


def write_mapped(
    directory: Path, parts: Iterable[FeatureArrays], num_rows: int, fingerprint: str
) -> None:
    """Write features that arrive in parts, atomically, in the memory of one part.

    Args:
        directory: replaced where it exists.
        parts: all rows, in order, with the same names.
        num_rows: rows of all parts.
        fingerprint: of the encoded rows.
    """
    with checked_directory(directory) as temporary:
        writers: dict[str, _Dense | _Bag] = {}
        for part in parts:
            for number, (name, value) in enumerate(part.items()):
                if name not in writers:
                    writers[name] = (
                        _Bag(temporary, number, value, num_rows)
                        if isinstance(value, BagArray)
                        else _Dense(temporary, number, value, num_rows)
                    )
                writers[name].add(value)
        for writer in writers.values():
            writer.close()
        content = {
            "fingerprint": fingerprint,
            "features": {
                name: {"number": number, "bag": isinstance(writer, _Bag)}
                for number, (name, writer) in enumerate(writers.items())
            },
        }
        write_checked_json(temporary / _FILE, content)


def open_mapped(directory: Path, fingerprint: str) -> FeatureArrays | None:
    """Open the features as read-only memory maps; None if there are none of this fingerprint.

    Raises:
        RunError: a file is missing or damaged.
    """
    path = directory / _FILE
    if not path.exists():
        return None
    verify_directory(directory, "remove that folder, and it is written again")
    try:
        content = read_json(path)
        if content["fingerprint"] != fingerprint:
            return None
        arrays: FeatureArrays = {}
        for name, facts in content["features"].items():
            number = facts["number"]
            if facts["bag"]:
                arrays[name] = BagArray(
                    _map(directory / f"{number}.values.npy"),
                    _map(directory / f"{number}.offsets.npy"),
                )
            else:
                arrays[name] = _map(directory / f"{number}.npy")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the encoded features at '{directory}' cannot be read ({error}); remove that folder, "
            "and they are written anew"
        ) from error
    return arrays


def is_mapped(arrays: FeatureArrays) -> bool:
    """Whether the arrays are memory maps, whose memory tensors must not share."""
    for value in arrays.values():
        dense = value.offsets if isinstance(value, BagArray) else value
        return isinstance(dense, np.memmap)
    return False


def slice_arrays(arrays: FeatureArrays, start: int, stop: int) -> FeatureArrays:
    """Copy rows start..stop-1."""
    result: FeatureArrays = {}
    for name, value in arrays.items():
        if isinstance(value, BagArray):
            offsets = np.array(value.offsets[start : stop + 1])
            values = np.array(value.values[offsets[0] : offsets[-1]])
            result[name] = BagArray(values, offsets - offsets[0])
        else:
            result[name] = np.array(value[start:stop])
    return result


def _map(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


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
