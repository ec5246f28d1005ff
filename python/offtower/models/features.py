"""From encoded features to one dense vector per row: what every built-in tower starts with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from offtower.data.encoding import BagTensor, FeatureEncoding

FeatureTensors = Mapping[str, Tensor | BagTensor]
"""Encoded features by name: numeric (n,), vector (n, dim), category (n,) int64, or a bag."""

UNKNOWN = 0
"""Index that every unseen category shares."""


class FeatureEncoder(nn.Module):
    """Concatenate standardised numbers, vectors and learned embeddings of categories and bags.

    Row 0 of every embedding table is the value "unknown". It starts at zero, so that an item never
    seen in training is scored from its other features alone, and it is trained by replacing a
    share `unknown_rate` of the known values with it.

    Args:
        encoding: fitted encoding of the features that arrive.
        category_embedding_dim: width of tables whose feature states none.
        unknown_rate: share of category values hidden in training mode.
        bag: a bag's embedding is the mean of its values' embeddings, or their sum over the root of
            their number.
    """

    def __init__(
        self,
        encoding: FeatureEncoding,
        category_embedding_dim: int = 16,
        unknown_rate: float = 0.0,
        bag: Literal["mean", "root"] = "mean",
    ) -> None:
        super().__init__()
        self.unknown_rate = unknown_rate
        self.bag = bag
        self.plain: list[str] = []
        self.tables = nn.ModuleDict()
        self._table_of: dict[str, str] = {}
        width = 0
        for spec in encoding.specs:
            if spec.kind == "numeric":
                self.plain.append(spec.name)
                width += 1
            elif spec.kind == "vector":
                self.plain.append(spec.name)
                assert spec.dim is not None, "a fitted vector feature has its dimension"
                width += spec.dim
            else:
                dim = spec.embedding_dim or category_embedding_dim
                rows = encoding.cardinality(spec.name)
                table: nn.Module = (
                    nn.Embedding(rows, dim)
                    if spec.kind == "category"
                    else nn.EmbeddingBag(rows, dim, mode="mean")
                )
                _initialise(table)
                # Module names must not hold dots; feature names may.
                key = f"feature_{len(self._table_of)}"
                self.tables[key] = table
                self._table_of[spec.name] = key
                width += dim
        self.width = width

    @property
    def random(self) -> bool:
        """Whether a forward pass in training mode draws random numbers."""
        return self.unknown_rate > 0.0 and len(self.tables) > 0

    def forward(self, features: FeatureTensors) -> Tensor:
        """Encoded features of n rows -> (n, width) float32."""
        parts: list[Tensor] = []
        for name in self.plain:
            value = features[name]
            assert isinstance(value, Tensor)
            parts.append(value if value.dim() == 2 else value.unsqueeze(1))
        for name, key in self._table_of.items():
            value = features[name]
            table = self.tables[key]
            if isinstance(value, BagTensor):
                mean = table(self._hide_some(value.values), value.offsets[:-1])
                if self.bag == "root":
                    count = value.offsets[1:] - value.offsets[:-1]
                    mean = mean * count.to(mean.dtype).sqrt().unsqueeze(1)
                parts.append(mean)
            else:
                parts.append(table(self._hide_some(value)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _hide_some(self, index: Tensor) -> Tensor:
        if not self.training or self.unknown_rate == 0.0:
            return index
        hidden = torch.rand(index.shape, device=index.device) < self.unknown_rate
        return index.masked_fill(hidden, UNKNOWN)


def embedding_tables(module: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """Tables of the categories and bags of every feature encoder inside `module`."""
    return [
        table
        for encoder in module.modules()
        if isinstance(encoder, FeatureEncoder)
        for table in encoder.tables.values()
        if isinstance(table, (nn.Embedding, nn.EmbeddingBag))
    ]


def _initialise(table: nn.Module) -> None:
    weight = table.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        weight[UNKNOWN].zero_()
