"""The behavior policies that a log names, and checks of what the configuration says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.config import SelectionConfig
from offtower.data.columns import category_values, hash_values
from offtower.data.log import Log
from offtower.errors import ConfigError, DataError
from offtower.evaluation.rows import Array, IntArray

_SHOWN = 3
"""Rows that a refusal names."""


@dataclass(frozen=True)
class BehaviorNames:
    """The values of a log's column `behavior_policy`.

    name: each distinct value as text. rows: number of rows of each. key: their hashes, as in
    `EncodedRows.behavior_policy`.
    """

    name: tuple[str, ...]
    rows: IntArray
    key: NDArray[np.uint64]

    @classmethod
    def of(cls, log: Log) -> BehaviorNames | None:
        """Read the column once; None where the schema names none.

        Raises DataError for a row without a value.
        """
        column = log.schema.behavior_policy
        if column is None:
            return None
        counts: dict[object, int] = {}
        keys: dict[object, np.uint64] = {}
        groups = range(len(log.row_group_sizes))
        tables = log.read_row_groups(groups, [column])
        for first, table in zip(log.first_rows.tolist(), tables, strict=True):
            values = category_values(table.column(column))
            if values.null_count:
                row = first + int(pc.index(pc.is_null(values), pa.scalar(True)).as_py())
                raise DataError(f"column '{column}' is null in row {row} of the log")
            for entry in pc.value_counts(values).to_pylist():
                value = entry["values"]
                counts[value] = counts.get(value, 0) + entry["counts"]
                keys[value] = hash_values(pa.array([value], type=values.type))[0]
        order = sorted(counts, key=str)
        return cls(
            tuple(str(value) for value in order),
            np.array([counts[value] for value in order], dtype=np.int64),
            np.array([keys[value] for value in order], dtype=np.uint64),
        )

    def index(self, key: NDArray[np.uint64]) -> IntArray:
        """(n,) which value each row has."""
        order = np.argsort(self.key)
        return order[np.searchsorted(self.key[order], key)]


def heuristic_refusal(names: BehaviorNames | None, options: SelectionConfig) -> str | None:
    """Say why the heuristic cannot run on a log, and what to add; None where it can."""
    if names is None:
        return (
            "the heuristic compares two or more behavior policies, and the log's schema names no "
            "column 'behavior_policy'"
        )
    if len(names.name) < 2:
        return (
            "the heuristic compares two or more behavior policies, and every row of this log has "
            f"the behavior policy '{names.name[0]}'"
        )
    if options.logging_runs is None and options.logging_columns is None:
        runs = ", ".join(f"{name}: RUN" for name in names.name)
        columns = ", ".join(f"{name}: COLUMN" for name in names.name)
        return (
            f"the heuristic needs each behavior policy's probability of every logged item, and "
            f"this log has the behavior policies {_listed(names.name)}. Name the run directory "
            f"of each, evaluation.selection.logging_runs={{{runs}}}, or, where the log holds "
            "them, the columns with their propensities, "
            f"evaluation.selection.logging_columns={{{columns}}}"
        )
    return None


def check_named(
    names: BehaviorNames | None, given: Mapping[str, str], option: str
) -> tuple[str, ...]:
    """Values of the option, in the order of the log's behavior policies.

    Raises ConfigError where option and log do not name the same policies.
    """
    if names is None:
        raise ConfigError(
            f"evaluation.selection.{option} names behavior policies, and the log's schema names "
            "no column 'behavior_policy'; for a log of one policy use "
            "evaluation.selection.logging_run"
        )
    missing = [name for name in names.name if name not in given]
    if missing:
        rows = names.rows[names.name.index(missing[0])]
        raise ConfigError(
            f"evaluation.selection.{option} lacks the behavior policy '{missing[0]}', which "
            f"logged {rows:,} rows; it has {_listed(given)}, the log has {_listed(names.name)}"
        )
    unknown = [name for name in given if name not in names.name]
    if unknown:
        raise ConfigError(
            f"evaluation.selection.{option} names '{unknown[0]}', which logged no row; the log has "
            f"{_listed(names.name)}"
        )
    return tuple(given[name] for name in names.name)


def check_logged(
    row: IntArray, pscore: Array, probability: Array, tolerance: float, what: str, remedy: str
) -> None:
    """Raise DataError, naming rows and values, where probabilities (n,) are not the logged ones."""
    wrong = np.flatnonzero(np.abs(probability - pscore) > tolerance * pscore)
    if wrong.size == 0:
        return
    worst = wrong[:_SHOWN]
    shown = "; ".join(
        f"row {row[i]}: logged {pscore[i]:.6g}, found {probability[i]:.6g}" for i in worst
    )
    raise DataError(
        f"{what} does not give the probabilities that were logged. {shown}. Of {len(row):,} rows "
        f"compared in one batch {wrong.size:,} differ by more than {100 * tolerance:g} % "
        f"(evaluation.selection.logging_tolerance); {remedy}"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
