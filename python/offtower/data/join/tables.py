"""Joins of tables that are read in parts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.join.partitions import join_partition
from offtower.data.join.plan import JoinCounts, JoinPlan
from offtower.data.join.records import (
    DECISION_RECORD,
    outcome_record,
    spill_decisions,
    spill_outcomes,
)
from offtower.data.join.spill import PARTITIONS, Spill
from offtower.errors import DataError

Tables = Callable[[], Iterable[pa.Table]]
"""Reads the rows from their start."""


@dataclass
class Joined:
    """Decisions with their rewards; `tables` reads them once, `counts` is complete before that."""

    tables: Iterator[pa.Table]
    counts: JoinCounts


def join_tables(decisions: pa.Table, outcomes: pa.Table, plan: JoinPlan) -> pa.Table:
    """Join two tables in memory; see `join_outcomes`."""
    with tempfile.TemporaryDirectory(prefix="offtower-join-") as folder:
        joined = join_outcomes(lambda: [decisions], lambda: [outcomes], plan, Path(folder))
        return pa.concat_tables(joined.tables)


def join_outcomes(decisions: Tables, outcomes: Tables, plan: JoinPlan, folder: Path) -> Joined:
    """Give each decision its rewards; a decision without an outcome has null, which is pending.

    Args:
        decisions: read twice, in the same order.
        outcomes: read once.
        folder: for temporary files, about 32 bytes a decision and 48 an outcome.

    Raises:
        DataError: a column is missing or of a wrong type, a key names two decisions, a decision has
            a null key, outcomes are duplicates or several without a rule, or no outcome matches.
    """
    left = Spill(folder / "decisions", DECISION_RECORD)
    right = Spill(folder / "outcomes", outcome_record(len(plan.rewards)))
    types: dict[str, pa.DataType] = {}
    rows = 0
    for table in decisions():
        spill_decisions(table, plan, left, types, rows)
        rows += table.num_rows
    if rows == 0:
        raise DataError("the decisions have no rows")
    total = JoinCounts(decisions=rows)
    for table in outcomes():
        total += spill_outcomes(table, plan, right, types, total.outcomes)
    left.close()
    right.close()
    rewards = np.memmap(
        folder / "rewards", dtype=np.float64, mode="w+", shape=(len(plan.rewards), rows)
    )
    # A null reward is a NaN in the file.
    for column in rewards:
        column[:] = np.nan
    for partition in range(PARTITIONS):
        total += join_partition(left.read(partition), right.read(partition), plan, rewards)
    if total.outcomes and total.unmatched == total.outcomes:
        pairs = ", ".join(f"{one} = {other}" for one, other in plan.keys)
        raise DataError(
            f"none of the {total.outcomes:,} outcomes belongs to a decision ({pairs}): compare "
            "the key columns of both files"
        )
    return Joined(_with_rewards(decisions, plan, rewards), total)


def _with_rewards(
    decisions: Tables, plan: JoinPlan, rewards: NDArray[np.float64]
) -> Iterator[pa.Table]:
    first = 0
    for table in decisions():
        rows = range(first, first + table.num_rows)
        first = rows.stop
        joined = table
        for reward, values in zip(plan.rewards, rewards, strict=True):
            part = np.asarray(values[rows.start : rows.stop])
            joined = joined.append_column(reward.name, pa.array(part, mask=np.isnan(part)))
        yield joined
