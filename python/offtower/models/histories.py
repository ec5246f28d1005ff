"""Encoders of histories: the events of a row, rows of a table of items, to one vector.

An event's vector is the item's row, plus an embedding of the event's type and a multiple of a
learned vector for its dwell where the log has them. Attention reads relative time: the score of two
events has a learned bias by head, of the binary logarithm of the time between them and of their
distance in the list. For the event that is read, time counts to the next one, and for the newest to
the row itself, as in HSTU (Zhai et al. 2024, "Actions speak louder than words").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offtower.config import HistoryConfig
from offtower.data.encoding import BagTensor, FeatureEncoding
from offtower.data.histories import AGE, DWELL, EVENT
from offtower.data.schema import FeatureSpec
from offtower.errors import ConfigError
from offtower.models.row_draws import RowDraws, RowDropout

_TIME_BUCKETS = 64
"""Two for each doubling of the time, up to 2^32."""
_HIDDEN = 4
"""Width of a transformer's inner layers, relative to that of the events' vectors."""
_DROPOUT = 1 << 17
"""First purpose number of dropout in histories; see `RowDraws`."""
_CPU_FLOAT32: Any = {"dtype": torch.float32, "device": "cpu"}


@dataclass(frozen=True)
class PaddedHistory:
    """Histories as matrices, for runtimes without lists of several lengths.

    Attributes:
        values: (n, w) int64, from the left, -1 behind the newest event.
        columns: (n, w) each, as those of a `BagTensor`.
    """

    values: Tensor
    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.values)


class ItemTable:
    """Rows of a table of items, by their codes.

    Several modules may read a table; the one that registers it as a submodule owns its weights.

    Args:
        table: row 0 is the unknown item.
    """

    def __init__(self, table: nn.Embedding) -> None:
        self.table = table

    @property
    def dim(self) -> int:
        return self.table.embedding_dim

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes of any shape -> (..., dim)."""
        rows: Tensor = self.table(codes)
        return rows


class HistoryEncoder(nn.Module):
    """Map the events of n rows to (n, width); an empty history to zeros.

    Args:
        spec: of the feature.
        encoding: fitted.
        table_dim: width of the items' rows.
        config: encoder and sizes.
        draws: of dropout.

    Raises:
        ConfigError: the width is no multiple of the heads.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        encoding: FeatureEncoding,
        table_dim: int,
        config: HistoryConfig,
        draws: RowDraws,
    ) -> None:
        super().__init__()
        width = config.width or table_dim
        if config.encoder != "mean" and config.width is None:
            width = max(width // config.heads, 1) * config.heads
        self.width = width
        if config.encoder != "mean" and width % config.heads:
            raise ConfigError(
                f"history.width is {width}, which is no multiple of history.heads, {config.heads}"
            )
        self.project = nn.Linear(table_dim, width, **_CPU_FLOAT32) if width != table_dim else None
        part = {one.kind: one.name for one in spec.parts}
        self.event_types: nn.Embedding | None = None
        if "category" in part:
            kinds = encoding.cardinality(part["category"])
            weight = torch.randn(kinds, width, **_CPU_FLOAT32) * width**-0.5
            self.event_types = nn.Embedding(kinds, width, _weight=weight)
        self.dwell = nn.Linear(1, width, bias=False, **_CPU_FLOAT32) if "numeric" in part else None
        timed = spec.times is not None
        self.pooling: _Pooling | None = None
        self.layers = nn.ModuleList()
        self.last: nn.LayerNorm | None = None
        if config.encoder == "attention":
            self.pooling = _Pooling(width, config.heads, spec.most_events, timed)
        elif config.encoder == "transformer":
            kind = _PointwiseLayer if config.attention == "pointwise" else _SoftmaxLayer
            drops = iter(range(_DROPOUT, _DROPOUT + 3 * config.layers))
            for _ in range(config.layers):
                dropouts = [RowDropout(config.dropout, draws, next(drops)) for _ in range(3)]
                sizes = _Sizes(width, config.heads, spec.most_events, timed)
                self.layers.append(kind(sizes, dropouts))
            self.last = nn.LayerNorm(width, **_CPU_FLOAT32)

    def forward(self, history: BagTensor | PaddedHistory, table: ItemTable) -> Tensor:
        """Histories of n rows, by the rows of `table` -> (n, width)."""
        events = _Events.of(history, table)
        vectors = self._vectors(events)
        some = events.length > 0
        if self.pooling is not None:
            pooled: Tensor = self.pooling(vectors, events)
            return pooled * some.unsqueeze(1)
        states = self._states(vectors, events)
        newest = (events.length - 1).clamp_min(0).view(-1, 1, 1).expand(-1, 1, states.shape[2])
        return states.gather(1, newest).squeeze(1) * some.unsqueeze(1)

    def states(self, history: BagTensor | PaddedHistory, table: ItemTable) -> Tensor:
        """(n, w, width) of a mean or a transformer after each event, which have read no later one:
        those of all prefixes of the histories in one pass. Behind the newest event they mean
        nothing."""
        assert self.pooling is None, "learned queries read whole histories"
        events = _Events.of(history, table)
        return self._states(self._vectors(events), events)

    def _vectors(self, events: _Events) -> Tensor:
        vectors = events.rows if self.project is None else self.project(events.rows)
        if self.event_types is not None:
            vectors = vectors + self.event_types(events.columns[EVENT])
        if self.dwell is not None:
            dwell = events.columns[DWELL].to(vectors.dtype)
            vectors = vectors + self.dwell(dwell.unsqueeze(2))
        return vectors

    def _states(self, vectors: Tensor, events: _Events) -> Tensor:
        if self.last is None:
            count = torch.arange(1, vectors.shape[1] + 1, device=vectors.device)
            return vectors.cumsum(dim=1) / count.unsqueeze(1).to(vectors.dtype)
        pairs = _Pairs.of(events)
        for layer in self.layers:
            vectors = layer(vectors, pairs)
        states: Tensor = self.last(vectors)
        return states


@dataclass(frozen=True)
class _Events:
    """Events of n rows from the left of matrices of w columns.

    Attributes:
        rows: (n, w, dim) of the table.
        length: (n,) numbers of events.
        columns: (n, w) each, 0 behind the newest event.
    """

    rows: Tensor
    length: Tensor
    columns: Mapping[str, Tensor]

    @classmethod
    def of(cls, history: BagTensor | PaddedHistory, table: ItemTable) -> _Events:
        if isinstance(history, PaddedHistory):
            present = history.values >= 0
            rows = table(history.values.clamp_min(0))
            return cls(rows, present.sum(dim=1), history.columns)
        length = history.offsets[1:] - history.offsets[:-1]
        n, total = len(length), len(history.values)
        widest = max(1, int(length.max())) if n else 1
        row = torch.repeat_interleave(
            torch.arange(n, device=length.device), length, output_size=total
        )
        column = torch.arange(total, device=length.device) - history.offsets[:-1][row]

        def padded(values: Tensor) -> Tensor:
            empty = values.new_zeros(n, widest, *values.shape[1:])
            return empty.index_put((row, column), values)

        columns = {name: padded(values) for name, values in history.columns.items()}
        # Rows are looked up before the padding, so that the table has no gradient from it.
        return cls(padded(table(history.values)), length, columns)

    @property
    def present(self) -> Tensor:
        """(n, w) bool."""
        position = torch.arange(self.rows.shape[1], device=self.rows.device)
        return position < self.length.unsqueeze(1)

    @property
    def next_age(self) -> Tensor | None:
        """(n, w) age of the next event, and of the row itself behind the newest."""
        age = self.columns.get(AGE)
        if age is None:
            return None
        position = torch.arange(age.shape[1], device=age.device)
        return torch.roll(age, -1, dims=1) * (position + 1 < self.length.unsqueeze(1))


@dataclass(frozen=True)
class _Sizes:
    width: int
    heads: int
    most_events: int
    timed: bool


class _RelativeBias(nn.Module):
    """Learned (n, heads, q, k) biases of scores; they start at zero."""

    def __init__(self, heads: int, most_events: int, timed: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(most_events, heads, **_CPU_FLOAT32))
        self.times = (
            nn.Parameter(torch.zeros(_TIME_BUCKETS, heads, **_CPU_FLOAT32)) if timed else None
        )

    def forward(self, distance: Tensor, bucket: Tensor | None) -> Tensor:
        """(..., q, k) distances in the list, and buckets of the times between the events."""
        bias = _rows_by_head(self.positions, distance.clamp_max(len(self.positions) - 1))
        if self.times is not None and bucket is not None:
            bias = bias + _rows_by_head(self.times, bucket)
        return bias


def _time_bucket(elapsed: Tensor) -> Tensor:
    """Times of any shape, at least 0 -> int32 buckets."""
    doublings = (1.0 + elapsed).log2()
    return (2.0 * doublings).clamp_max(_TIME_BUCKETS - 1).int()


def _rows_by_head(table: Tensor, index: Tensor) -> Tensor:
    """Rows (rows, heads) of a small table by an index (..., q, k) -> (..., heads, q, k)."""
    if table.device.type != "cpu":
        # `index_select` sums gradients in no fixed order there.
        return functional.embedding(index, table).movedim(-1, -3)
    # For 128 histories of 200 events an eighth of the time of `embedding`, 1/20 backward.
    flat = index.reshape(-1)
    by_head = [column.index_select(0, flat).view(index.shape) for column in table.unbind(dim=1)]
    return torch.stack(by_head, dim=-3)


@dataclass(frozen=True)
class _Pairs:
    """Each event with each earlier one and itself; the same for all layers.

    Attributes:
        attends: (w, w) bool, whether the event of the row reads that of the column.
        distance: (w, w) in the list, 0 for later events.
        bucket: (n, w, w) of the times between them, if the log has times.
    """

    attends: Tensor
    distance: Tensor
    bucket: Tensor | None

    @classmethod
    def of(cls, events: _Events) -> _Pairs:
        position = torch.arange(events.rows.shape[1], device=events.rows.device)
        distance = position.unsqueeze(1) - position.unsqueeze(0)
        age, next_age = events.columns.get(AGE), events.next_age
        bucket = None
        if age is not None and next_age is not None:
            elapsed = (age.unsqueeze(1) - next_age.unsqueeze(2)).clamp_min(0.0)
            bucket = _time_bucket(elapsed)
        return cls(distance >= 0, distance.clamp_min(0), bucket)


class _CausalBias(_RelativeBias):
    """The biases of all pairs of events; those of later events are not part of them."""

    def of(self, pairs: _Pairs) -> Tensor:
        """(n or 1, heads, w, w)."""
        bias: Tensor = self(pairs.distance, pairs.bucket)
        return bias if bias.dim() == 4 else bias.unsqueeze(0)


class _Pooling(nn.Module):
    """A weighted mean of events, by the scores of learned queries, one for each head."""

    def __init__(self, width: int, heads: int, most_events: int, timed: bool) -> None:
        super().__init__()
        self.heads = heads
        query = torch.randn(heads, width // heads, **_CPU_FLOAT32)
        self.query = nn.Parameter(query)
        self.keys = nn.Linear(width, 2 * width, **_CPU_FLOAT32)
        self.out = nn.Linear(width, width, **_CPU_FLOAT32)
        self.bias = _RelativeBias(heads, most_events, timed)

    def forward(self, vectors: Tensor, events: _Events) -> Tensor:
        n, w, _ = vectors.shape
        key, value = _by_head(self.keys(vectors), 2, self.heads)
        query = self.query.view(1, self.heads, 1, -1).expand(n, -1, -1, -1)
        position = torch.arange(w, device=vectors.device)
        distance = (events.length.unsqueeze(1) - 1 - position).clamp_min(0).unsqueeze(1)
        age = events.columns.get(AGE)
        bias = self.bias(distance, None if age is None else _time_bucket(age.unsqueeze(1)))
        # Finite, since a row without events would have no weights.
        low = torch.finfo(bias.dtype).min / 2
        mask = bias.masked_fill(~events.present.view(n, 1, 1, w), low).to(key.dtype)
        mean = functional.scaled_dot_product_attention(query.to(key.dtype), key, value, mask)
        pooled: Tensor = self.out(_joined(mean).squeeze(1))
        return pooled


class _SoftmaxLayer(nn.Module):
    """Causal self-attention and a feed-forward layer, normalized before (Vaswani et al. 2017;
    Xiong et al. 2020)."""

    def __init__(self, sizes: _Sizes, dropouts: list[RowDropout]) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.norm = nn.LayerNorm(width, **_CPU_FLOAT32)
        self.mixed = nn.Linear(width, 3 * width, **_CPU_FLOAT32)
        self.out = nn.Linear(width, width, **_CPU_FLOAT32)
        self.bias = _CausalBias(sizes.heads, sizes.most_events, sizes.timed)
        self.second_norm = nn.LayerNorm(width, **_CPU_FLOAT32)
        self.up = nn.Linear(width, _HIDDEN * width, **_CPU_FLOAT32)
        self.down = nn.Linear(_HIDDEN * width, width, **_CPU_FLOAT32)
        self.dropouts = nn.ModuleList(dropouts)

    def forward(self, vectors: Tensor, pairs: _Pairs) -> Tensor:
        first, second, third = self.dropouts
        query, key, value = _by_head(self.mixed(self.norm(vectors)), 3, self.heads)
        bias = self.bias.of(pairs)
        mask = bias.masked_fill(~pairs.attends, float("-inf")).to(query.dtype)
        mean = functional.scaled_dot_product_attention(query, key, value, mask)
        vectors = vectors + first(self.out(_joined(mean)))
        hidden = second(functional.gelu(self.up(self.second_norm(vectors))))
        total: Tensor = vectors + third(self.down(hidden))
        return total


class _PointwiseLayer(nn.Module):
    """A layer of HSTU: SiLU of scores instead of their softmax, and a gate (Zhai et al. 2024)."""

    def __init__(self, sizes: _Sizes, dropouts: list[RowDropout]) -> None:
        super().__init__()
        width = sizes.width
        self.heads, self.most_events = sizes.heads, sizes.most_events
        self.norm = nn.LayerNorm(width, **_CPU_FLOAT32)
        self.mixed = nn.Linear(width, 4 * width, **_CPU_FLOAT32)
        self.out = nn.Linear(width, width, **_CPU_FLOAT32)
        self.bias = _CausalBias(sizes.heads, sizes.most_events, sizes.timed)
        self.second_norm = nn.LayerNorm(width, **_CPU_FLOAT32)
        self.dropouts = nn.ModuleList(dropouts[:1])

    def forward(self, vectors: Tensor, pairs: _Pairs) -> Tensor:
        mixed = functional.silu(self.mixed(self.norm(vectors)))
        gate, rest = mixed.split([vectors.shape[2], mixed.shape[2] - vectors.shape[2]], dim=2)
        query, key, value = _by_head(rest, 3, self.heads)
        bias = self.bias.of(pairs)
        weight = functional.silu(query @ key.transpose(2, 3) + bias) * pairs.attends
        # The longest history, not that of the batch, so that rows do not depend on each other.
        total = self.second_norm(_joined(weight.to(value.dtype) @ value / self.most_events))
        result: Tensor = vectors + self.dropouts[0](self.out(gate * total))
        return result


def _by_head(mixed: Tensor, count: int, heads: int) -> tuple[Tensor, ...]:
    """(n, w, count x width) -> `count` tensors (n, heads, w, width / heads)."""
    n, w, total = mixed.shape
    return mixed.view(n, w, count, heads, total // count // heads).permute(2, 0, 3, 1, 4).unbind()


def _joined(by_head: Tensor) -> Tensor:
    """(n, heads, w, d) -> (n, w, heads x d)."""
    # No view: the strides of attention's output differ between runtimes.
    return torch.cat(by_head.unbind(dim=1), dim=2)
