"""A catalogue's encoded features on a GPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from offtower.data.features import (
    BagArray,
    BagTensor,
    FeatureArrays,
    nbytes,
    take,
    to_device,
    to_tensors,
)
from offtower.models.features import ItemTensors
from offtower.models.items import ItemFeatures

_BLOCK_BYTES = 1 << 26
_FREE_SHARE = 0.25


def items_to_device(
    items: ItemFeatures, device: torch.device, max_bytes: int | None = None
) -> ItemFeatures:
    """Return the features for towers on `device`.

    Args:
        max_bytes: larger features stay in host memory or mapped, and each chunk is transferred when
            it is embedded; None is a quarter of the free memory.
    """
    if device.type == "cpu":
        return items
    if max_bytes is None:
        max_bytes = int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
    return DeviceItemFeatures(items, device, max_bytes)


class DeviceItemFeatures(ItemFeatures):
    """Features on a GPU.

    Args:
        host: the features on the CPU.
        max_bytes: as for `items_to_device`.
    """

    def __init__(self, host: ItemFeatures, device: torch.device, max_bytes: int) -> None:
        super().__init__(host.arrays, host.num_items, host.first)
        self.device = device
        self.resident = nbytes(host.arrays) <= max_bytes
        """Whether all features are on the GPU; else they are transferred on each access."""
        self._host, self._max_bytes = host, max_bytes
        self._here: dict[str, Tensor | BagTensor] = {}
        if self.resident:
            self._here = {name: _all(value, device) for name, value in host.arrays.items()}

    def slice(self, start: int, stop: int) -> ItemTensors:
        if not self.resident:
            return _sent(self._host.slice(start, stop), self.device)
        return {name: self._part(name, start, stop) for name in self._here}

    def part(self, start: int, stop: int) -> ItemFeatures:
        return self._host.part(start, stop)

    def on_same_device(self, items: ItemFeatures) -> ItemFeatures:
        return DeviceItemFeatures(items, self.device, self._max_bytes)

    def at(self, index: Tensor) -> ItemTensors:
        if not self.resident:
            return _sent(self._host.at(index), self.device)
        # Bag lengths are read on the CPU, which avoids a synchronization.
        bags: FeatureArrays = {k: v for k, v in self.arrays.items() if isinstance(v, BagArray)}
        found = to_tensors(take(bags, index.numpy()), self.device) if bags else {}
        there = to_device(index, self.device)
        return {
            name: found[name] if isinstance(value, BagTensor) else value[there]
            for name, value in self._here.items()
        }

    def _part(self, name: str, start: int, stop: int) -> Tensor | BagTensor:
        value, array = self._here[name], self.arrays[name]
        if isinstance(value, BagTensor):
            assert isinstance(array, BagArray)
            first, last = int(array.offsets[start]), int(array.offsets[stop])
            return BagTensor(value.values[first:last], value.offsets[start : stop + 1] - first)
        return value[start:stop]


def _sent(features: ItemTensors, device: torch.device) -> ItemTensors:
    return {
        name: BagTensor(to_device(value.values, device), to_device(value.offsets, device))
        if isinstance(value, BagTensor)
        else to_device(value, device)
        for name, value in features.items()
    }


def _all(value: np.ndarray | BagArray, device: torch.device) -> Tensor | BagTensor:
    if isinstance(value, BagArray):
        return BagTensor(_filled(value.values, device), _filled(value.offsets, device))
    return _filled(value, device)


def _filled(array: np.ndarray, device: torch.device) -> Tensor:
    """Transfer an array or memory map in blocks of bounded host memory."""
    dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
    tensor = torch.empty(array.shape, dtype=dtype, device=device)
    step = max(1, _BLOCK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), step):
        tensor[start : start + step] = to_device(
            torch.from_numpy(np.array(array[start : start + step])), device
        )
    return tensor
