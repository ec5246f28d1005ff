"""Encoded rows of a log, as arrays for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import (
    as_float_array,
    hashed,
    integers,
    timestamps,
)
from offtower.data.eligible import EligibleRows, eligible_items
from offtower.data.encoding import (
    FeatureArrays,
    FeatureEncoding,
    concat,
    nbytes,
    take,
    tensor_of,
)
from offtower.data.round_tables import position_order
from offtower.data.rounds import Rounds
from offtower.data.row_sketch import sketched_keys
from offtower.data.schema import LogSchema, PscoreKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class EncodedRows:
    """n rows of a log."""

    context: FeatureArrays
    action: NDArray[np.int64]
    """(n,) item numbers in the catalogue."""
    reward: NDArray[np.float32]
    pscore: NDArray[np.float64] | None
    row: NDArray[np.int64]
    """(n,) number of the row in the whole log."""
    timestamp: NDArray[np.int64] | None = None
    behavior_policy: NDArray[np.uint64] | None = None
    """(n,) stable hash of the policy's name."""
    position: NDArray[np.int64] | None = None
    round_id: NDArray[np.uint64] | None = None
    user_id: NDArray[np.uint64] | None = None
    """(n,) stable hash of the user's id."""
    eligible: EligibleRows | None = None
    """Which items could have been shown; None where every item could."""
    rewards: NDArray[np.float64] | None = None
    """(n, R) the schema's named rewards, whose weighted sum `reward` is; None without them."""
    content: NDArray[np.uint64] | None = None
    """(n,) hashes for `RowSketch.with_keys`, where they were asked for."""
    row_weight: NDArray[np.float64] | None = None
    """(n,) known weights, 1 / sampling rate; None where every row counts once."""
    pscore_kind: PscoreKind | None = None
    """Set where the rows are whole rounds of a log of slates, each in the order of positions."""

    @property
    def rounds(self) -> Rounds | None:
        """The rounds of a log of slates; None for other logs."""
        if self.pscore_kind is None:
            return None
        assert self.position is not None, "a log of slates has positions"
        return Rounds.of_positions(self.position)

    @property
    def unit_key(self) -> NDArray[np.int64] | NDArray[np.uint64]:
        """(n,) key of the rows that a fold keeps together: user, else round, else the row alone."""
        if self.user_id is not None:
            return self.user_id
        return self.row if self.round_id is None else self.round_id

    def __len__(self) -> int:
        return len(self.row)

    @property
    def nbytes(self) -> int:
        arrays = [getattr(self, name) for name in COLUMNS]
        return nbytes(self.context) + sum(int(a.nbytes) for a in arrays if a is not None)

    def take(self, index: NDArray[np.int64]) -> EncodedRows:
        """Select rows by index."""
        columns: dict[str, Any] = {name: _taken(getattr(self, name), index) for name in COLUMNS}
        context = take(self.context, index)
        return EncodedRows(context=context, pscore_kind=self.pscore_kind, **columns)

    def without_context(self) -> EncodedRows:
        """Return the rows without context features."""
        return replace(self, context={})

    @classmethod
    def concat(cls, parts: Sequence[EncodedRows]) -> EncodedRows:
        """Concatenate the rows of all parts."""
        columns: dict[str, Any] = {
            name: joined_column([getattr(part, name) for part in parts]) for name in COLUMNS
        }
        context = concat([part.context for part in parts])
        return cls(context=context, pscore_kind=parts[0].pscore_kind, **columns)


COLUMNS = tuple(f.name for f in fields(EncodedRows) if f.name not in ("context", "pscore_kind"))
"""Fields of `EncodedRows` that are arrays of length n."""


def _taken(column: Any, index: NDArray[np.int64]) -> Any:
    if isinstance(column, EligibleRows):
        return column.take(index)
    return None if column is None else column[index]


def joined_column(parts: Sequence[Any]) -> Any:
    """Concatenate one column of several parts; None where the parts have none."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], EligibleRows):
        return EligibleRows.concat(parts)
    return np.concatenate(parts)


def encode_rows(
    table: pa.Table,
    schema: LogSchema,
    catalogue: Catalogue,
    context_encoding: FeatureEncoding,
    first_row: int,
    row: NDArray[np.int64] | None = None,
    *,
    sketched: bool = False,
) -> EncodedRows:
    """Encode checked rows.

    Args:
        table: rows that passed the row check.
        first_row: number of the table's first row in the whole log.
        row: (n,) numbers of the rows if some were left out; consecutive by default.
        sketched: also hash the rows' contents.
    """
    if row is None:
        row = np.arange(first_row, first_row + table.num_rows, dtype=np.int64)

    def keys(name: str | None) -> NDArray[np.uint64] | None:
        return None if name is None else hashed(table.column(name))

    if schema.slates:
        order = position_order(table, schema)
        if order is not None:
            table, row = table.take(pa.array(order)), row[order]
    position = schema.position
    timestamp = schema.timestamp
    eligible = eligible_items(catalogue, schema)
    return EncodedRows(
        context=context_encoding.encode(table),
        action=catalogue.index_of(table.column(schema.action)),
        reward=as_float_array(table.column(schema.reward)).astype(np.float32),
        pscore=None if schema.pscore is None else as_float_array(table.column(schema.pscore)),
        row=row,
        timestamp=None if timestamp is None else timestamps(table.column(timestamp)),
        behavior_policy=keys(schema.behavior_policy),
        position=None if position is None else integers(table.column(position)),
        round_id=keys(schema.round_id),
        user_id=keys(schema.user_id),
        rewards=named_rewards(table, schema),
        content=sketched_keys(table, schema) if sketched else None,
        row_weight=row_weights(table, schema),
        eligible=None if eligible is None else eligible.encode(table),
        pscore_kind=schema.pscore_kind if schema.slates else None,
    )


def relative_weights(rows: EncodedRows, mean: float, device: torch.device) -> Tensor | None:
    """(n,) weights of the rows over the log's mean weight; None where rows have none."""
    return None if rows.row_weight is None else tensor_of(rows.row_weight / mean, device)


def named_rewards(table: pa.Table, schema: LogSchema) -> NDArray[np.float64] | None:
    """(n, R) named rewards, null as NaN; None where the schema has none."""
    if not schema.rewards:
        return None
    return np.stack([as_float_array(table.column(one.source)) for one in schema.rewards], axis=1)


def with_summed_reward(table: pa.Table, schema: LogSchema) -> pa.Table:
    """Return the table with the weighted sum of the named rewards, null where one of them is."""
    rewards = named_rewards(table, schema)
    if rewards is None or schema.reward in table.column_names:
        return table
    total = rewards @ np.array([one.weight for one in schema.rewards])
    return table.append_column(schema.reward, pa.array(total, mask=np.isnan(total)))


def row_weights(table: pa.Table, schema: LogSchema) -> NDArray[np.float64] | None:
    """(n,) weights of the rows of a down-sampled log; None where the schema names none."""
    if schema.weight is None:
        return None
    values = as_float_array(table.column(schema.weight))
    return values if schema.weight_kind == "weight" else 1.0 / values
