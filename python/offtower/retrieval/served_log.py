"""Served decisions as log rows for `offtower ingest`."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offtower.data.schema import LogSchema
from offtower.errors import DataError
from offtower.retrieval.retriever import Retriever, SampleResult

ROUND, POSITION = "round_id", "position"


def decisions_table(
    retriever: Retriever,
    contexts: pa.Table,
    served: SampleResult,
    *,
    round_id: pa.Array | None = None,
    served_at: datetime | None = None,
) -> pa.Table:
    """Make one log row per shown item: context, item, pscore, position, round, time and policy.

    Column names are those of the log that the policy was trained on. `pscore_error` is the relative
    standard error of the propensity.

    Args:
        contexts: the n served rows; further columns, such as a user id, are kept.
        round_id: (n,) text ids for joining rewards; made from time and row by default.

    Raises:
        DataError: contexts and served results differ in number.
    """
    schema = served_schema(retriever)
    n, k = served.item.shape
    if contexts.num_rows != n:
        raise DataError(f"{contexts.num_rows} contexts, but {n} were served")
    now = served_at or datetime.now(UTC)
    if round_id is None:
        round_id = pa.array([f"{now:%Y%m%dT%H%M%S%f}-{row}" for row in range(n)])
    row = pa.array(np.repeat(np.arange(n), k))
    table = contexts.take(row)
    columns = {
        schema.action: retriever.item_ids.take(pa.array(served.item.reshape(-1))),
        schema.pscore or "pscore": pa.array(served.pscore.reshape(-1)),
        "pscore_error": pa.array(served.relative_error.reshape(-1)),
        POSITION: pa.array(np.tile(np.arange(k, dtype=np.int64), n)),
        ROUND: round_id.take(row),
        schema.timestamp or "timestamp": pa.array(
            np.full(n * k, now.replace(tzinfo=None), dtype="datetime64[us]")
        ),
        schema.behavior_policy or "behavior_policy": pa.repeat(f"export {served.version}", n * k),
    }
    for name, column in columns.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


def served_schema(retriever: Retriever) -> LogSchema:
    """Return the log schema of `decisions_table`, for `offtower ingest`."""
    schema = LogSchema.from_dict(retriever.manifest["log_schema"])
    return replace(
        schema,
        pscore=schema.pscore or "pscore",
        timestamp=schema.timestamp or "timestamp",
        behavior_policy=schema.behavior_policy or "behavior_policy",
        position=POSITION,
        round_id=ROUND,
        user_id=schema.user_id,
    )


def with_rewards(
    decisions: pa.Table, outcomes: pa.Table, schema: LogSchema, *, missing: float | None = 0.0
) -> pa.Table:
    """Join decisions with outcomes by round and position.

    Args:
        outcomes: columns round_id, position and the schema's reward.
        missing: reward of shown items without an outcome; None raises for them.

    Raises:
        DataError: an outcome is duplicate, belongs to no decision, or is missing.
    """
    keys = [ROUND, POSITION]
    for name in (*keys, schema.reward):
        if name not in outcomes.column_names:
            raise DataError(f"the outcomes have no column '{name}'")
    wanted = outcomes.select([*keys, schema.reward])
    if wanted.group_by(keys).aggregate([]).num_rows != wanted.num_rows:
        raise DataError("duplicate outcomes: each round_id and position may appear once")
    if wanted.join(decisions.select(keys), keys, join_type="left anti").num_rows:
        raise DataError("some outcomes belong to no decision: their round_id was never served")
    order = decisions.append_column("_row", pa.array(np.arange(decisions.num_rows)))
    reward = order.select([*keys, "_row"]).join(wanted, keys, join_type="left outer")
    column = reward.sort_by("_row").column(schema.reward)
    if column.null_count:
        if missing is None:
            raise DataError(f"{column.null_count} shown items have no outcome")
        column = pc.fill_null(pc.cast(column, pa.float64()), missing)
    if schema.reward in decisions.column_names:
        decisions = decisions.drop_columns([schema.reward])
    return decisions.append_column(schema.reward, column)
