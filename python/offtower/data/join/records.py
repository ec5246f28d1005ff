"""The records of decisions and outcomes that a join reads: keys, times and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.columns import (
    as_array,
    as_float_array,
    is_category,
    is_number,
    is_text,
    null_mask,
)
from offtower.data.join.keys import hash_rows
from offtower.data.join.plan import JoinCounts, JoinedReward, JoinPlan
from offtower.data.join.spill import Spill
from offtower.data.outcomes import NULL_TIME, check_same_clock, comparable_times, duration_in
from offtower.errors import DataError

DECISION_RECORD = np.dtype([("key", "u8", 2), ("row", "i8"), ("time", "i8")])


def spill_decisions(
    table: pa.Table, plan: JoinPlan, spill: Spill, types: dict[str, pa.DataType], first: int
) -> None:
    """Add the decisions of a table, whose first row has number `first`, to the spill.

    types: of key and time columns; filled by the first table.
    """
    mine = [one for one, _ in plan.keys]
    _need(table, [*mine, *([] if plan.decided is None else [plan.decided])], "the decisions")
    taken = [reward.name for reward in plan.rewards if reward.name in table.column_names]
    if taken:
        raise DataError(
            f"the decisions have a column '{taken[0]}' already: rewards of an earlier join or of "
            "another log. Join to the decisions as they were served"
        )
    for name in mine:
        column = table.column(name)
        if not is_category(column.type):
            raise DataError(f"key column '{name}' is {column.type}, expected text or integers")
        types.setdefault(name, column.type)
        if column.null_count:
            row = int(np.flatnonzero(null_mask(column))[0])
            raise DataError(f"decision {first + row} has no key: column '{name}' is null")
    found = np.empty(table.num_rows, dtype=DECISION_RECORD)
    found["key"] = hash_rows([table.column(name) for name in mine])
    found["row"] = np.arange(first, first + table.num_rows)
    found["time"] = NULL_TIME
    if plan.decided is not None and plan.came is not None:
        times = table.column(plan.decided)
        types.setdefault(plan.decided, times.type)
        found["time"] = comparable_times(times)
    spill.add(found)


def spill_outcomes(
    table: pa.Table, plan: JoinPlan, spill: Spill, types: dict[str, pa.DataType], first: int
) -> JoinCounts:
    """Add the outcomes of a table, whose first row has number `first`; what was found in it.

    types: of the decisions' columns.
    """
    names = [other for _, other in plan.keys]
    _need(table, [*names, *([] if plan.came is None else [plan.came])], "the outcomes")
    columns = [table.column(name) for name in names]
    for (mine, other), column in zip(plan.keys, columns, strict=True):
        wanted = types[mine]
        if not is_category(column.type) or is_text(column.type) != is_text(wanted):
            raise DataError(
                f"key column '{mine}' of the decisions is {wanted}, '{other}' of the outcomes is "
                f"{column.type}: write both as text, or both as integers"
            )
    found = np.empty(table.num_rows, dtype=spill.kind)
    found["key"] = hash_rows(columns)
    found["order"] = np.arange(first, first + table.num_rows)
    found["time"] = found["limit"] = NULL_TIME
    newest = None
    if plan.came is not None:
        came = table.column(plan.came)
        if plan.decided is not None:
            check_same_clock(types[plan.decided], came.type, plan.decided, plan.came)
        found["time"] = comparable_times(came)
        newest = int(found["time"].max(initial=NULL_TIME))
        newest = None if newest == NULL_TIME else newest
        if plan.window is not None:
            found["limit"] = duration_in(came, plan.window, plan.came)
    found["whole"] = hash_rows([table.column(name) for name in _hashable(table)])[:, 0]
    for index, reward in enumerate(plan.rewards):
        found["value"][:, index] = _values(table, reward)
    known = np.ones(table.num_rows, dtype=bool)
    for column in columns:
        known &= as_array(column).is_valid().to_numpy(False)
    spill.add(found[known])
    return JoinCounts(outcomes=table.num_rows, unmatched=int((~known).sum()), newest=newest)


def _values(table: pa.Table, reward: JoinedReward) -> NDArray[np.float64]:
    if reward.source not in table.column_names:
        if reward.rule == "any" and reward.column is None:
            return np.ones(table.num_rows)  # A row is an event.
        raise DataError(
            f"the outcomes have no column '{reward.source}'; they have "
            f"{', '.join(table.column_names)}"
        )
    column = table.column(reward.source)
    if not is_number(column.type) and not pa.types.is_boolean(column.type):
        raise DataError(f"column '{reward.source}' of the outcomes is {column.type}, not a number")
    values = as_float_array(column)
    wrong = np.isinf(values)
    if wrong.any():
        raise DataError(f"outcome {int(wrong.argmax())}: column '{reward.source}' is infinite")
    return values


def _hashable(table: pa.Table) -> list[str]:
    return [
        field.name
        for field in table.schema
        if is_category(field.type) or is_number(field.type) or pa.types.is_timestamp(field.type)
    ]


def _need(table: pa.Table, names: list[str], what: str) -> None:
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{what} have no column '{missing[0]}'; they have {', '.join(table.column_names)}"
        )


def outcome_record(rewards: int) -> np.dtype[Any]:
    """The type of an outcome with so many values."""
    return np.dtype(
        [
            ("key", "u8", 2),
            ("order", "i8"),
            ("time", "i8"),
            ("limit", "i8"),
            ("whole", "u8"),
            ("value", "f8", (rewards,)),
        ]
    )
