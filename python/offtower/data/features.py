"""Encoded features by name: dense arrays, and bags as values and offsets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BagArray:
    """Lists of category indices: row i holds values[offsets[i]:offsets[i + 1]]."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]
    """(rows + 1,)."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further arrays parallel to `values`, by name: what a history says of its events."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class BagTensor:
    """A `BagArray` as tensors."""

    values: Tensor
    offsets: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1


FeatureArrays = dict[str, np.ndarray | BagArray]
"""numeric float32 (n,), vector float32 (n, dim), category int64 (n,), bag and history BagArray."""


def num_rows(arrays: Mapping[str, np.ndarray | BagArray]) -> int:
    """Return the number of rows; 0 without features."""
    return next((len(value) for value in arrays.values()), 0)


def nbytes(arrays: Mapping[str, np.ndarray | BagArray]) -> int:
    """Return the size of the arrays in bytes."""
    return sum(
        sum(one.nbytes for one in (value.values, value.offsets, *value.columns.values()))
        if isinstance(value, BagArray)
        else value.nbytes
        for value in arrays.values()
    )


def take(arrays: Mapping[str, np.ndarray | BagArray], index: NDArray[np.int64]) -> FeatureArrays:
    """Select rows by index."""
    return {
        name: take_bag(value, index) if isinstance(value, BagArray) else value[index]
        for name, value in arrays.items()
    }


def take_bag(bag: BagArray, index: NDArray[np.int64]) -> BagArray:
    lengths = bag.offsets[index + 1] - bag.offsets[index]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # Position of each value: the start of its row plus its offset in the row.
    starts = bag.offsets[:-1][index]
    positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    columns = {name: column[positions] for name, column in bag.columns.items()}
    return BagArray(bag.values[positions], offsets, columns)


def concat(parts: Sequence[FeatureArrays]) -> FeatureArrays:
    """Concatenate the rows of all parts."""
    return {name: _concat_one([part[name] for part in parts]) for name in parts[0]}


def _concat_one(values: Sequence[np.ndarray | BagArray]) -> np.ndarray | BagArray:
    bags = [value for value in values if isinstance(value, BagArray)]
    if not bags:
        return np.concatenate([value for value in values if isinstance(value, np.ndarray)])
    ends = np.cumsum([0] + [int(bag.offsets[-1]) for bag in bags])
    offsets = [bag.offsets[1:] + end for bag, end in zip(bags, ends[:-1], strict=True)]
    return BagArray(
        np.concatenate([bag.values for bag in bags]),
        np.concatenate([np.zeros(1, dtype=np.int64), *offsets]),
        {name: np.concatenate([bag.columns[name] for bag in bags]) for name in bags[0].columns},
    )


def to_tensors(
    arrays: Mapping[str, np.ndarray | BagArray], device: torch.device = CPU
) -> dict[str, Tensor | BagTensor]:
    """Convert to tensors, which share memory on the CPU."""
    return {
        name: BagTensor(
            tensor_of(value.values, device),
            tensor_of(value.offsets, device),
            {key: tensor_of(column, device) for key, column in value.columns.items()},
        )
        if isinstance(value, BagArray)
        else tensor_of(value, device)
        for name, value in arrays.items()
    }


def tensor_of(array: np.ndarray, device: torch.device = CPU) -> Tensor:
    """Convert an array to a tensor, which shares memory on the CPU; a tensor of a read-only array
    must not be written to, which would end the process."""
    if array.flags.writeable:
        return to_device(torch.from_numpy(array), device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only memory.
        return to_device(torch.from_numpy(array), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a CPU tensor to `device`, to a GPU asynchronously through pinned memory."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
