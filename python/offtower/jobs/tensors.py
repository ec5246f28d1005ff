"""Share large tensors between the workers of a node.

Ray keeps NumPy arrays in memory that all workers of a node share, but copies torch tensors into
each worker.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from offtower.jobs.resources import import_ray

_MIN_SHARED_BYTES = 1 << 20


def share_large_tensors() -> None:
    """Send tensors of at least 1 MiB as shared memory from now on.

    They are read-only in the workers: writing to one ends the process. Smaller ones are copied.
    """
    import_ray()
    from ray.util import register_serializer

    register_serializer(Tensor, serializer=_pack, deserializer=_unpack)


def _pack(tensor: Tensor) -> tuple[bool, Any, torch.dtype]:
    plain = tensor.detach().contiguous()
    # NumPy has no bfloat16; its bits are sent as integers.
    bits = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
    array = bits.cpu().numpy()
    return array.nbytes >= _MIN_SHARED_BYTES, array, plain.dtype


def _unpack(packed: tuple[bool, Any, torch.dtype]) -> Tensor:
    shared, array, dtype = packed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only memory.
        tensor = torch.from_numpy(array if shared else array.copy())
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor
