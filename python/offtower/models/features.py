"""The encoder at the bottom of every built-in tower: encoded features to one vector per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from offtower.config import HistoryConfig
from offtower.data.encoding import BagTensor, FeatureEncoding
from offtower.data.schema import FeatureSpec
from offtower.models.bag_sums import bag_sums
from offtower.models.histories import HistoryEncoder, ItemTable, PaddedHistory
from offtower.models.row_draws import RowDraws

FeatureTensors = Mapping[str, Tensor | BagTensor | PaddedHistory]
"""Encoded features by name: numeric (n,), vector (n, dim), category (n,) int64, a bag or a
history."""

ItemTensors = Mapping[str, Tensor | BagTensor]
"""Those of items, which have no histories."""

UNKNOWN = 0
"""Index that every unseen category shares."""

_FIRST_HISTORY = 1 << 15
"""First purpose number of events hidden from histories; smaller ones are for tables."""

_INITIAL_BLOCK = 4096
"""Rows of a table whose initial values come from one random stream."""


@dataclass(frozen=True)
class Tables:
    """How the tables of an encoder differ from ones of its own for all values.

    Attributes:
        rows: number of rows, by feature, for a shard of the catalogue.
        items: tables that histories read, by feature; they stay with the module that owns them.
        dim: width of every table, overriding the features' own.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    items: Mapping[str, ItemTable] = field(default_factory=dict)
    dim: int | None = None


ALL_ROWS = Tables()


class FeatureEncoder(nn.Module):
    """Concatenate standardized numbers, vectors, encoded histories, and learned embeddings of
    categories, bags and the tokens of texts, which are bags here.

    Row 0 of every embedding table is the value "unknown". It starts at zero, so that an unseen item
    is scored from its other features, and is trained by replacing a share `unknown_rate` of the
    known values with it.

    Args:
        encoding: fitted encoding of the features that arrive.
        category_embedding_dim: width of tables whose feature sets none.
        unknown_rate: share of category values hidden in training mode.
        draws: random draws of the hidden values.
        tables: that are not of this encoder, or not whole.
        bag: pooling of a bag's embeddings: their mean, or their sum divided by the square root of
            their number.
        history: encoder of histories.
    """

    def __init__(
        self,
        encoding: FeatureEncoding,
        category_embedding_dim: int = 16,
        unknown_rate: float = 0.0,
        draws: RowDraws | None = None,
        tables: Tables = ALL_ROWS,
        bag: Literal["mean", "root"] = "mean",
        history: HistoryConfig | None = None,
    ) -> None:
        super().__init__()
        self.unknown_rate = unknown_rate
        self.bag = bag
        self._draws = draws or RowDraws()
        self.plain: list[str] = []
        self.tables = nn.ModuleDict()
        self.initial_seeds: dict[str, int] = {}
        """By table, for `initial_rows`."""
        self.histories = nn.ModuleDict()
        self.item_tables: dict[str, ItemTable] = {}
        """What histories read, by feature."""
        self._table_of: dict[str, str] = {}
        self._history_of: dict[str, str] = {}
        width = 0
        self.plain_width = 0
        for number, spec in enumerate(encoding.specs):
            if spec.kind in ("numeric", "vector"):
                self.plain.append(spec.name)
                assert spec.kind == "numeric" or spec.dim is not None, "a fitted vector has its dim"
                width += spec.dim or 1
                self.plain_width += spec.dim or 1
                continue
            if spec.name not in tables.items:
                dim = tables.dim or spec.embedding_dim or category_embedding_dim
                rows = tables.rows.get(spec.name, encoding.cardinality(spec.name))
                self._add_table(spec, rows, dim, fill=spec.name not in tables.rows)
            if spec.history:
                table = tables.items.get(spec.name) or ItemTable(self.embedding(spec.name))
                self.item_tables[spec.name] = table
                key = self._history_of[spec.name] = f"feature_{number}"
                reader = HistoryEncoder(
                    spec, encoding, table.dim, history or HistoryConfig(), self._draws
                )
                self.histories[key] = reader
                width += reader.width
                self.plain_width += reader.width
            else:
                width += dim
        self.width = width

    def _add_table(self, spec: FeatureSpec, rows: int, dim: int, *, fill: bool) -> None:
        empty = torch.empty(rows, dim, dtype=torch.float32, device="cpu")
        table: nn.Module = (
            nn.EmbeddingBag(rows, dim, mode="mean", _weight=empty)
            if spec.pooled
            else nn.Embedding(rows, dim, _weight=empty)
        )
        # One draw of the global generator for a table of any size.
        seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
        # Module names must not hold dots; feature names may.
        key = f"feature_{len(self._table_of)}"
        self.tables[key] = table
        self.initial_seeds[key] = seed
        if fill:
            _fill(table, initial_rows(seed, torch.arange(rows, device="cpu"), dim))
        self._table_of[spec.name] = key

    def embedding(self, feature: str) -> nn.Embedding:
        """Table of a category, or of a history that has its own."""
        table = self.tables[self.table_of(feature)]
        assert isinstance(table, nn.Embedding), "only bags and texts have other tables"
        return table

    @property
    def random(self) -> bool:
        """Whether a forward pass in training mode draws random numbers."""
        return self.unknown_rate > 0.0 and len(self.tables) + len(self.histories) > 0

    def table_of(self, feature: str) -> str:
        """Key of the table of a category or bag, or of a history that has its own."""
        return self._table_of[feature]

    @property
    def pooled_tables(self) -> dict[str, nn.Embedding | nn.EmbeddingBag]:
        """Tables whose rows are outputs, those of categories and bags, by feature."""
        found: dict[str, nn.Embedding | nn.EmbeddingBag] = {}
        for name, key in self._table_of.items():
            table = self.tables[key]
            assert isinstance(table, (nn.Embedding, nn.EmbeddingBag))
            if name not in self.item_tables:
                found[name] = table
        return found

    @property
    def tables_by_weight(self) -> dict[str, str]:
        """By name of a weight within this module, the feature whose values are its rows."""
        found = {f"tables.{key}.weight": name for name, key in self._table_of.items()}
        for name, key in self._history_of.items():
            reader = self.histories[key]
            assert isinstance(reader, HistoryEncoder)
            if reader.event_types is not None:
                found[f"histories.{key}.event_types.weight"] = f"{name}/events"
        return found

    def without(self, features: FeatureTensors, name: str) -> list[Tensor]:
        """Numbers, vectors and embeddings of n rows, (n, width) each, but for one category's."""
        names = [other for other in self._table_of if other not in self._history_of]
        pairs = zip(names, self.embeddings(features), strict=True)
        return [*self.numbers(features), *(value for other, value in pairs if other != name)]

    @property
    def shared_table(self) -> nn.Embedding | None:
        """The table of items that histories read and another module owns."""
        shared = [one.table for name, one in self.item_tables.items() if name not in self._table_of]
        return shared[0] if shared else None

    def read_items(self, table: nn.Embedding, through: ItemTable) -> None:
        """Let the histories that read `table` get its rows from `through`."""
        for name, current in self.item_tables.items():
            if current.table is table:
                self.item_tables[name] = through

    def forward(self, features: FeatureTensors) -> Tensor:
        """Encoded features of n rows -> (n, width) float32."""
        parts = [*self.numbers(features), *self.embeddings(features)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def numbers(self, features: FeatureTensors) -> list[Tensor]:
        """Standardized numbers, vectors and encoded histories of n rows, (n, width) each."""
        parts: list[Tensor] = []
        for name in self.plain:
            value = features[name]
            assert isinstance(value, Tensor)
            parts.append(value if value.dim() == 2 else value.unsqueeze(1))
        for name, key in self._history_of.items():
            history = features[name]
            assert not isinstance(history, Tensor)
            if isinstance(history, BagTensor):
                number = _FIRST_HISTORY + int(key.removeprefix("feature_"))
                history = replace(history, values=self._hide_in_bags(history, number))
            parts.append(self.histories[key](history, self.item_tables[name]))
        return parts

    def embeddings(self, features: FeatureTensors) -> list[Tensor]:
        """Embeddings of the categories and bags of n rows, (n, width of the table) each."""
        parts: list[Tensor] = []
        for number, (name, key) in enumerate(self._table_of.items()):
            if name in self._history_of:
                continue
            value = features[name]
            assert not isinstance(value, PaddedHistory)
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
