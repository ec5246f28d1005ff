"""Item features, and embedding the catalogue in bounded memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from offtower.data.catalogue import Catalogue
from offtower.data.encoding import (
    BagTensor,
    FeatureArrays,
    FeatureEncoding,
    concat,
    nbytes,
    to_tensors,
)
from offtower.data.features import CPU
from offtower.data.mapped import open_mapped, slice_arrays, write_mapped
from offtower.data.node_cache import SHARE_ABOVE, built_entry, verified_entry
from offtower.models.features import ItemTensors
from offtower.models.towers import Tower

DEFAULT_CHUNK = 65_536
_FORMAT = "features 1"


@dataclass(frozen=True)
class ItemEmbeddings:
    """Embeddings of the whole catalogue."""

    embedding: Tensor
    """(N, d)."""
    bias: Tensor | None
    """(N,) or None."""


class ItemFeatures:
    """Encoded features of all N items, read by slice or by index, on the CPU; `items_to_device` of
    `models.device_items` gives those of a GPU.

    Args:
        arrays: encoded features of all items in the catalogue's order, possibly mapped read-only.
        num_items: N.
        first: number of the first item, for a part of a catalogue.
        keeper: lives as long as the features.
    """

    def __init__(
        self, arrays: FeatureArrays, num_items: int, first: int = 0, keeper: object = None
    ) -> None:
        self.num_items = num_items
        self.first = first
        self.device = CPU
        self._arrays = arrays
        self._tensors: ItemTensors = to_tensors(arrays)
        self._keeper = keeper
        self._source: tuple[Any, ...] | None = None
        """Arguments of `_reopened`, where another process can open them."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keeper": None}

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Sent as the place of shared files, if they are of a catalogue in files."""
        if self._source is not None:
            return _reopened, self._source
        return super().__reduce_ex__(protocol)

    @classmethod
    def from_catalogue(
        cls,
        catalogue: Catalogue,
        encoding: FeatureEncoding,
        chunk: int = DEFAULT_CHUNK,
        *,
        share_above: int = SHARE_ABOVE,
    ) -> ItemFeatures:
        """Encode a catalogue, `chunk` items at a time.

        Args:
            share_above: features of more bytes are mapped from files that one process of this
                machine writes (`data.node_cache`).
        """
        n = catalogue.num_items
        parts = (
            encoding.encode(catalogue.table(start, min(start + chunk, n)))
            for start in range(0, n, chunk)
        )
        first = next(parts)
        if n <= chunk:
            return cls(first, n)
        size = -(-nbytes(first) * n // chunk)
        if size <= share_above:
            return cls(concat([first, *parts]), n)
        content = repr((_FORMAT, catalogue.fingerprint, n, encoding.digest))
        key = hashlib.sha256(content.encode()).hexdigest()[:32]
        entry = built_entry(
            key,
            size,
            lambda folder: write_mapped(folder, chain([first], parts), n),
            f"the features of {n:,} items",
        )
        if entry is not None:
            found = cls(open_mapped(entry.path), n, keeper=entry)
            if catalogue.in_files:
                found._source = (key, catalogue, encoding, chunk, share_above)
            return found
        # Deleted with the object that reads it.
        temporary = tempfile.TemporaryDirectory(prefix="offtower-items-")
        folder = Path(temporary.name)
        whole = range(0, n, chunk)
        again = (encoding.encode(catalogue.table(at, min(at + chunk, n))) for at in whole)
        write_mapped(folder, again, n)
        return cls(open_mapped(folder), n, keeper=temporary)

    def slice(self, start: int, stop: int) -> ItemTensors:
        """Features of items start..stop-1, as views."""
        if start == 0 and stop == self.num_items:
            return self._tensors
        return {
            name: _slice_bag(value, start, stop)
            if isinstance(value, BagTensor)
            else value[start:stop]
            for name, value in self._tensors.items()
        }

    @property
    def arrays(self) -> FeatureArrays:
        """The encoded features."""
        return self._arrays

    def part(self, start: int, stop: int) -> ItemFeatures:
        """Items start..stop-1 by themselves, as views on the CPU."""
        arrays = slice_arrays(self._arrays, start, stop)
        return ItemFeatures(arrays, stop - start, self.first + start, self._keeper)

    def on_same_device(self, items: ItemFeatures) -> ItemFeatures:
        """Others, given out on the device of these."""
        return items

    def numbered(self, start: int, stop: int) -> tuple[ItemTensors, Tensor]:
        """Features of items start..stop-1 and the items' numbers, as a tower takes them."""
        numbers = torch.arange(self.first + start, self.first + stop, device=self.device)
        return self.slice(start, stop), numbers

    def at(self, index: Tensor) -> ItemTensors:
        """Features of the items at `index` (n,) int64, on the CPU."""
        return {
            name: _take_bag(value, index) if isinstance(value, BagTensor) else value[index]
            for name, value in self._tensors.items()
        }


def _reopened(
    key: str, catalogue: Catalogue, encoding: FeatureEncoding, chunk: int, share_above: int
) -> ItemFeatures:
    """The features of this machine's cache; they are encoded where it has none."""
    entry = verified_entry(key)
    if entry is None:
        return ItemFeatures.from_catalogue(catalogue, encoding, chunk, share_above=share_above)
    found = ItemFeatures(open_mapped(entry.path), catalogue.num_items, keeper=entry)
    found._source = (key, catalogue, encoding, chunk, share_above)
    return found


def embed_items(
    tower: Tower, features: ItemFeatures, *, chunk: int = DEFAULT_CHUNK
) -> ItemEmbeddings:
    """Embed every item; differentiable in the tower's parameters in O(N d + chunk) memory.

    Chunks are embedded without a graph, and the backward pass embeds each chunk again with a graph
    (gradient checkpointing). Random draws are repeated; for a user's module the generator's state
    is restored.
    """
    if features.num_items <= chunk or not torch.is_grad_enabled():
        return _embed_at_once(tower, features, chunk)
    parameters = [p for p in tower.parameters() if p.requires_grad]
    if not parameters:
        return _embed_at_once(tower, features, chunk)
    embedding, bias = _ChunkedTower.apply(tower, features, chunk, *parameters)  # type: ignore[no-untyped-call]
    return ItemEmbeddings(embedding, bias)


def _embed_at_once(tower: Tower, features: ItemFeatures, chunk: int) -> ItemEmbeddings:
    if features.num_items <= chunk:
        embedding, bias = tower(*features.numbered(0, features.num_items))
        return ItemEmbeddings(embedding, bias)
    embeddings: Tensor | None = None
    biases: Tensor | None = None
    for start, stop in _chunks(features.num_items, chunk):
        embedding, bias = tower(*features.numbered(start, stop))
        if embeddings is None:
            embeddings = embedding.new_empty(features.num_items, embedding.shape[1])
            biases = None if bias is None else bias.new_empty(features.num_items)
        embeddings[start:stop] = embedding
        if biases is not None:
            biases[start:stop] = bias
    assert embeddings is not None, "a catalogue has at least one item"
    return ItemEmbeddings(embeddings, biases)


class _ChunkedTower(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tower: Tower, features: ItemFeatures, chunk: int, *parameters: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.tower, ctx.features, ctx.chunk, ctx.parameters = tower, features, chunk, parameters
        ctx.random = tower.training and tower.random
        ctx.random_state = _RandomState(features.device) if ctx.random else None
        with torch.no_grad():
            items = _embed_at_once(tower, features, chunk)
        return items.embedding, items.bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        grad_embedding, grad_bias = gradients
        totals: list[Tensor | None] = [None] * len(ctx.parameters)
        with _repeated_draws(ctx.random_state), torch.enable_grad():
            for start, stop in _chunks(ctx.features.num_items, ctx.chunk):
                embedding, bias = ctx.tower(*ctx.features.numbered(start, stop))
                outputs, cotangents = [], []
                if grad_embedding is not None:
                    outputs.append(embedding)
                    cotangents.append(grad_embedding[start:stop])
                if bias is not None and grad_bias is not None:
                    outputs.append(bias)
                    cotangents.append(grad_bias[start:stop])
                parts = torch.autograd.grad(outputs, ctx.parameters, cotangents, allow_unused=True)
                for position, part in enumerate(parts):
                    if part is None:
                        continue
                    total = totals[position]
                    # In place: with an id embedding a part is as large as the table.
                    totals[position] = part if total is None else total.add_(part)
        return (None, None, None, *totals)


class _RandomState:
    """State of torch's generators on the CPU and the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu, self.device)


@contextmanager
def _repeated_draws(state: _RandomState | None) -> Iterator[None]:
    if state is None:
        yield
        return
    now = _RandomState(state.device)
    state.restore()
    try:
        yield
    finally:
        now.restore()


def _chunks(total: int, chunk: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, chunk):
        yield start, min(start + chunk, total)


def _slice_bag(bag: BagTensor, start: int, stop: int) -> BagTensor:
    first, last = int(bag.offsets[start]), int(bag.offsets[stop])
    return BagTensor(bag.values[first:last], bag.offsets[start : stop + 1] - first)


def _take_bag(bag: BagTensor, index: Tensor) -> BagTensor:
    lengths = (bag.offsets[1:] - bag.offsets[:-1])[index]
    offsets = lengths.new_zeros(len(index) + 1)
    torch.cumsum(lengths, 0, out=offsets[1:])
    starts = bag.offsets[:-1][index]
    positions = torch.arange(int(offsets[-1]), device=offsets.device) + torch.repeat_interleave(
        starts - offsets[:-1], lengths
    )
    return BagTensor(bag.values[positions], offsets)
