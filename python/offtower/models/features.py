"""The encoder at the bottom of every built-in tower: encoded features to one vector per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from offtower.data.encoding import BagTensor, FeatureEncoding
from offtower.models.bag_sums import bag_sums
from offtower.models.row_draws import RowDraws

FeatureTensors = Mapping[str, Tensor | BagTensor]
"""Encoded features by name: numeric (n,), vector (n, dim), category (n,) int64, or a bag."""

UNKNOWN = 0
"""Index that every unseen category shares."""

_INITIAL_BLOCK = 4096
"""Rows of a table whose initial values come from one random stream."""


class FeatureEncoder(nn.Module):
    """Concatenate standardized numbers, vectors and learned embeddings of categories and bags.

    Row 0 of every embedding table is the value "unknown". It starts at zero, so that an unseen item
    is scored from its other features, and is trained by replacing a share `unknown_rate` of the
    known values with it.

    Args:
        encoding: fitted encoding of the features that arrive.
        category_embedding_dim: width of tables whose feature sets none.
        unknown_rate: share of category values hidden in training mode.
        draws: random draws of the hidden values.
        table_rows: number of rows of some features' tables, for a shard of the catalogue.
        bag: pooling of a bag's embeddings: their mean, or their sum divided by the square root of
            their number.
        table_dim: width of every table, overriding the features' own.
    """

    def __init__(
        self,
        encoding: FeatureEncoding,
        category_embedding_dim: int = 16,
        unknown_rate: float = 0.0,
        draws: RowDraws | None = None,
        table_rows: Mapping[str, int] | None = None,
        bag: Literal["mean", "root"] = "mean",
        table_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.unknown_rate = unknown_rate
        self.bag = bag
        self._draws = draws or RowDraws()
        self.plain: list[str] = []
        self.tables = nn.ModuleDict()
        self.initial_seeds: dict[str, int] = {}
        """By table, for `initial_rows`."""
        self._table_of: dict[str, str] = {}
        width = 0
        self.plain_width = 0
        for spec in encoding.specs:
            if spec.kind == "numeric":
                self.plain.append(spec.name)
                width += 1
                self.plain_width += 1
            elif spec.kind == "vector":
                self.plain.append(spec.name)
                assert spec.dim is not None, "a fitted vector feature has its dimension"
                width += spec.dim
                self.plain_width += spec.dim
            else:
                dim = table_dim or spec.embedding_dim or category_embedding_dim
                rows = (table_rows or {}).get(spec.name, encoding.cardinality(spec.name))
                empty = torch.empty(rows, dim, dtype=torch.float32, device="cpu")
                table: nn.Module = (
                    nn.Embedding(rows, dim, _weight=empty)
                    if spec.kind == "category"
                    else nn.EmbeddingBag(rows, dim, mode="mean", _weight=empty)
                )
                # One draw of the global generator for a table of any size.
                seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
                # Module names must not hold dots; feature names may.
                key = f"feature_{len(self._table_of)}"
                self.tables[key] = table
                self.initial_seeds[key] = seed
                if spec.name not in (table_rows or {}):
                    _fill(table, initial_rows(seed, torch.arange(rows, device="cpu"), dim))
                self._table_of[spec.name] = key
                width += dim
        self.width = width

    @property
    def random(self) -> bool:
        """Whether a forward pass in training mode draws random numbers."""
        return self.unknown_rate > 0.0 and len(self.tables) > 0

    def table_of(self, feature: str) -> str:
        """Key of the table of a category or bag."""
        return self._table_of[feature]

    def forward(self, features: FeatureTensors) -> Tensor:
        """Encoded features of n rows -> (n, width) float32."""
        parts = [*self.numbers(features), *self.embeddings(features)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def numbers(self, features: FeatureTensors) -> list[Tensor]:
        """Standardized numbers and vectors of n rows, (n, width) each."""
        parts: list[Tensor] = []
        for name in self.plain:
            value = features[name]
            assert isinstance(value, Tensor)
            parts.append(value if value.dim() == 2 else value.unsqueeze(1))
        return parts

    def embeddings(self, features: FeatureTensors) -> list[Tensor]:
        """Embeddings of the categories and bags of n rows, (n, width of the table) each."""
        parts: list[Tensor] = []
        for number, (name, key) in enumerate(self._table_of.items()):
            value = features[name]
            table = self.tables[key]
            if isinstance(value, BagTensor):
                parts.append(self._joined(table, self._hide_in_bags(value, number), value.offsets))
            else:
                parts.append(table(self._hide_some(value, number)))
        return parts

    def _joined(self, table: nn.Module, values: Tensor, offsets: Tensor) -> Tensor:
        assert isinstance(table, nn.EmbeddingBag)
        count = (offsets[1:] - offsets[:-1]).to(table.weight.dtype).unsqueeze(1)
        if self.training and uses_bag_sums(table):
            total = bag_sums(table.weight, values, offsets)
            some = count.clamp_min(1.0)
            return total / (some.sqrt() if self.bag == "root" else some)
        mean: Tensor = table(values, offsets[:-1])
        return mean * count.sqrt() if self.bag == "root" else mean

    @property
    def _hides(self) -> bool:
        return self.training and self.unknown_rate > 0.0

    def _hide_some(self, index: Tensor, number: int) -> Tensor:
        if not self._hides:
            return index
        hidden = self._draws.below(self.unknown_rate, number, len(index), index.device)[:, 0]
        return index.masked_fill(hidden, UNKNOWN)

    def _hide_in_bags(self, bag: BagTensor, number: int) -> Tensor:
        if not self._hides:
            return bag.values
        lengths, total = bag.offsets[1:] - bag.offsets[:-1], len(bag.values)
        device = bag.values.device
        numbers = self._draws.numbers
        if numbers is None:
            numbers = torch.arange(len(lengths), device=device)
        first = torch.repeat_interleave(bag.offsets[:-1], lengths, output_size=total)
        # The key is (row, position in the bag); positions beyond 2^20 share draws.
        place = torch.arange(total, device=device) - first
        value = (torch.repeat_interleave(numbers, lengths, output_size=total) << 20) + place
        hidden = self._draws.of(value, self.unknown_rate, number)[:, 0]
        return bag.values.masked_fill(hidden, UNKNOWN)


def embedding_tables(module: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """Tables of the categories and bags of every feature encoder inside `module`."""
    return [
        table
        for encoder in module.modules()
        if isinstance(encoder, FeatureEncoder)
        for table in encoder.tables.values()
        if isinstance(table, (nn.Embedding, nn.EmbeddingBag))
    ]


def initial_rows(seed: int, rows: Tensor, dim: int) -> Tensor:
    """(k, dim) initial values of the rows (k,) of a table, normal with variance 1 / dim.

    A row's values depend only on the seed and its number, so a shard of a table can be initialized
    without the rest.
    """
    values = torch.empty(len(rows), dim, dtype=torch.float32, device="cpu")
    if len(rows) == 0:
        return values
    block = torch.div(rows, _INITIAL_BLOCK, rounding_mode="floor")
    order = torch.argsort(block, stable=True)
    found, counts = torch.unique_consecutive(block[order], return_counts=True)
    start = 0
    for number, count in zip(found.tolist(), counts.tolist(), strict=True):
        generator = torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * number) % 2**63)
        drawn = torch.randn(
            _INITIAL_BLOCK, dim, generator=generator, dtype=torch.float32, device="cpu"
        )
        wanted = order[start : start + count]
        values[wanted] = drawn[rows[wanted] - number * _INITIAL_BLOCK]
        start += count
    return values.mul_(dim**-0.5)


def _fill(table: nn.Module, values: Tensor) -> None:
    weight = table.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(values)
        weight[UNKNOWN].zero_()


def uses_bag_sums(table: nn.EmbeddingBag) -> bool:
    """Whether training pools the bags of a table with `bag_sums`."""
    return table.weight.device.type == "cpu" and not table.sparse
