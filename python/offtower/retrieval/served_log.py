"""Served decisions as log rows for `offtower ingest`."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.columns import as_array, is_text
from offtower.data.eligible_schema import EligibleSchema, ListForm
from offtower.data.histories import parsed_times
from offtower.data.schema import CatalogueSchema, LogSchema
from offtower.errors import DataError
from offtower.retrieval.results import SampleResult
from offtower.retrieval.retriever import Retriever

ROUND, POSITION, EXCLUDED = "round_id", "position", "excluded"


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
    standard error of the propensity. The rows have no reward: `offtower.data.join` adds it. Items
    that the call excluded are a column too, so that evaluation leaves them out as serving did. A
    context that was shown nothing has no row.

    Args:
        contexts: the n served rows; further columns, such as a user id, are kept. Columns that the
            log schema names for something other than the context or the user (the reward or the
            weight of an old log) belong to other decisions and are left out.
        round_id: (n,) distinct text ids for joining outcomes; by default made from the time, a
            random number for each call, and the row, so that no two calls share one.

    Raises:
        DataError: contexts and served results differ in number, or round ids repeat.
    """
    schema = served_schema(retriever, served)
    n = len(served.item)
    if contexts.num_rows != n:
        raise DataError(f"{contexts.num_rows} contexts, but {n} were served")
    now = served_at or datetime.now(UTC)
    if round_id is None:
        call = f"{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:16]}"
        round_id = pa.array([f"{call}-{row}" for row in range(n)])
    elif len(round_id.unique()) != n:
        raise DataError(f"{n} contexts need {n} distinct round ids, got {len(round_id.unique())}")
    shown = served.item >= 0
    number, position = np.nonzero(shown)
    row = pa.array(number)
    table = _without_old_decisions(contexts, schema).take(row)
    columns = {
        schema.action: retriever.item_ids.take(pa.array(served.item[shown])),
        schema.pscore or "pscore": pa.array(served.pscore[shown]),
        "pscore_error": pa.array(served.relative_error[shown]),
        POSITION: pa.array(position.astype(np.int64)),
        ROUND: round_id.take(row),
        schema.timestamp or "timestamp": _times(retriever, contexts, now).take(row),
        schema.behavior_policy or "behavior_policy": pa.repeat(served.policy, len(number)),
    }
    if served.excluded is not None:
        assert schema.eligible is not None and schema.eligible.exclude is not None
        name = schema.eligible.exclude.column
        columns[name] = _excluded(retriever, contexts, served.excluded, name).take(row)
    for name, column in columns.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


def served_schema(retriever: Retriever, served: SampleResult | None = None) -> LogSchema:
    """Return the log schema of `decisions_table`, for `offtower ingest`.

    All rows are kept, so it names no weight.

    served: where its call excluded items, the schema's section `eligible` names their column.
    """
    schema = LogSchema.from_dict(retriever.manifest["log_schema"])
    if served is not None and served.excluded is not None:
        section, form = schema.eligible, ListForm(EXCLUDED)
        if section is None:
            schema = replace(schema, eligible=EligibleSchema(exclude=form))
        elif section.exclude is None:
            schema = replace(schema, eligible=replace(section, exclude=form))
    return replace(
        schema,
        pscore=schema.pscore or "pscore",
        timestamp=schema.timestamp or "timestamp",
        behavior_policy=schema.behavior_policy or "behavior_policy",
        position=POSITION,
        pscore_kind="conditional",
        round_id=ROUND,
        user_id=schema.user_id,
        weight=None,
    )


def catalogue_section(retriever: Retriever) -> CatalogueSchema:
    """Return the schema of the exported catalogue, for `offtower ingest`."""
    return CatalogueSchema.from_dict(retriever.manifest["catalogue"]["schema"])


def _excluded(
    retriever: Retriever, contexts: pa.Table, excluded: list[NDArray[np.int64]], name: str
) -> pa.Array:
    """(n,) lists of ids: those that the contexts exclude by `name`, and those of the call."""
    ids = [retriever.ids_of(items) for items in excluded]
    if name in contexts.column_names:
        own = contexts.column(name).to_pylist()
        ids = [list(dict.fromkeys([*(a or []), *b])) for a, b in zip(own, ids, strict=True)]
    return pa.array(ids, pa.list_(retriever.item_ids.type))


def _times(retriever: Retriever, contexts: pa.Table, now: datetime) -> pa.Array:
    """(n,) times of the rows: those by which items were eligible; where histories have times, those
    that the contexts give; or the time of serving."""
    eligible = retriever.eligible
    times = None if eligible is None else eligible.times(contexts, now)
    used = retriever.tower.encoding.timestamp
    if times is None and used is not None:
        # The ages of a history's events are relative to it.
        given = as_array(contexts.column(used))
        return parsed_times(given) if is_text(given.type) else given
    if times is None:
        naive = np.full(contexts.num_rows, now.replace(tzinfo=None), dtype="datetime64[us]")
        times = pa.array(naive)
    return times


def _without_old_decisions(contexts: pa.Table, schema: LogSchema) -> pa.Table:
    """Drop the columns of a logged decision: reward, propensity, item and the like."""
    kept = {name for spec in schema.context for name in spec.sources} | {schema.user_id}
    kept |= set() if schema.eligible is None else set(schema.eligible.log_columns)
    old = (set(schema.columns) | {"pscore_error"}) - kept
    return contexts.drop_columns([name for name in contexts.column_names if name in old])
