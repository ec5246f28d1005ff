"""The catalogue embedded on workers, in files that all of them map."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.data import array_files
from offtower.data.array_files import WrittenFile, array_writer, map_array, part_names, part_rows
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import tensor_of, to_tensors
from offtower.execution import Execution
from offtower.models.items import DEFAULT_CHUNK, ItemEmbeddings
from offtower.models.policy import TwoTowerPolicy
from offtower.progress import report_rows


@dataclass(frozen=True)
class StoredEmbeddings(ItemEmbeddings):
    """Embeddings in files; another process maps these instead of getting a copy."""

    directory: Path
    keeper: object = None
    """Lives as long as the files are needed; other processes are sent none."""

    def __reduce__(self) -> tuple[Callable[..., StoredEmbeddings], tuple[Any, ...]]:
        return open_embeddings, (self.directory, len(self.embedding), self.bias is not None)


def open_embeddings(
    directory: Path, num_items: int, has_bias: bool, keeper: object = None
) -> StoredEmbeddings:
    """Map the files that `embed_on_workers` wrote, read-only."""

    def mapped(name: str) -> Tensor:
        files = [directory / file for file in part_names(name, num_items)]
        return tensor_of(np.asarray(map_array(files)))

    bias = mapped("bias") if has_bias else None
    return StoredEmbeddings(mapped("embedding"), bias, directory, keeper)


def embed_on_workers(
    policy: TwoTowerPolicy,
    catalogue: Catalogue,
    folder: Path,
    execution: Execution,
    *,
    chunk: int = DEFAULT_CHUNK,
) -> StoredEmbeddings | None:
    """Embed a catalogue in parts of `array_files.PART_ROWS` items, with the bits of `embed_items`.

    Args:
        folder: that all workers see; a folder in it holds the files, and is removed with the
            result.

    Returns:
        None where the parts run in this process, or there is only one.
    """
    n = catalogue.num_items
    if not execution.mapper.distributed or n <= array_files.PART_ROWS:
        return None
    if array_files.PART_ROWS % chunk:
        raise ValueError(
            f"parts of {array_files.PART_ROWS:,} items are not whole chunks of {chunk:,}"
        )
    kept = tempfile.TemporaryDirectory(prefix=".embedded.", suffix=".partial", dir=folder.resolve())
    directory = Path(kept.name)
    names = zip(part_names("embedding", n), part_names("bias", n), strict=True)
    parts = [(*files, rows) for files, rows in zip(names, part_rows(n), strict=True)]
    training = policy.training
    policy.eval()
    embed = partial(_embed_part, policy, catalogue, directory, chunk)
    execution.progress.start("embedding items", n)
    for _ in report_rows(execution.mapper.map(embed, parts, "embedding items"), execution.progress):
        pass
    execution.progress.finish()
    policy.train(training)
    has_bias = (directory / part_names("bias", n)[0]).exists()
    return open_embeddings(directory, n, has_bias, kept)


@dataclass(frozen=True)
class _Embedded:
    rows: int


@torch.no_grad()
def _embed_part(
    policy: TwoTowerPolicy,
    catalogue: Catalogue,
    directory: Path,
    chunk: int,
    part: tuple[str, str, range],
) -> _Embedded:
    """Embed the items of a part and write its files (idempotent)."""
    *names, items = part
    found: list[list[NDArray[np.float32]]] = [[], []]
    for start in range(items.start, items.stop, chunk):
        stop = min(start + chunk, items.stop)
        features = to_tensors(policy.item_encoding.encode(catalogue.table(start, stop)))
        numbers = torch.arange(start, stop)
        for values, tensor in zip(found, policy.item_tower(features, numbers), strict=True):
            if tensor is not None:
                values.append(tensor.numpy())
    for name, values in zip(names, found, strict=True):
        if values:
            shape = (len(items), *values[0].shape[1:])
            with array_writer(directory / name, np.float32, shape, WrittenFile()) as append:
                for block in values:
                    append(block)
    return _Embedded(len(items))
