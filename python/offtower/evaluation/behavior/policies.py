"""The policies that made a log, where known: their runs, or columns of their propensities."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.config import EvaluationConfig, SelectionConfig
from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_float_array, category_values, hash_values
from offtower.data.encoding import to_tensors
from offtower.data.log import Log
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows, hashed
from offtower.errors import ConfigError, DataError
from offtower.evaluation.run_loading import open_run
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.models.items import ItemEmbeddings
from offtower.models.policy import TwoTowerPolicy

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

WRONG_PROPENSITY = 0.01
"""Median distance of log-probabilities beyond which a single run did not make the log."""
_SHOWN = 3
"""Rows that a refusal names."""


@dataclass(frozen=True)
class BehaviorNames:
    """The values of a log's column `behavior_policy`.

    name: each distinct value as text. rows: of each. key: their hashes, as `EncodedRows` has them.
    """

    name: tuple[str, ...]
    rows: Integers
    key: NDArray[np.uint64]

    @classmethod
    def of(cls, log: Log) -> BehaviorNames | None:
        """One pass over that column; None where the schema names none.

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

    def index(self, key: NDArray[np.uint64]) -> Integers:
        """(n,) which value each row has."""
        order = np.argsort(self.key)
        return order[np.searchsorted(self.key[order], key)]


def heuristic_refusal(names: BehaviorNames | None, options: SelectionConfig) -> str | None:
    """Why the heuristic cannot run on a log, and what to add; None where it can."""
    if names is None:
        return (
            "the heuristic compares two or more behaviour policies, and the log's schema names no "
            "column 'behavior_policy' that tells them apart"
        )
    if len(names.name) < 2:
        return (
            "the heuristic compares two or more behaviour policies, and every row of this log has "
            f"the behaviour policy '{names.name[0]}'"
        )
    if options.logging_runs is None and options.logging_columns is None:
        runs = ", ".join(f"{name}: RUN" for name in names.name)
        columns = ", ".join(f"{name}: COLUMN" for name in names.name)
        return (
            f"the heuristic needs each behaviour policy's probability of every logged item, and "
            f"this log has the behaviour policies {_listed(names.name)}. Name the run directory "
            f"of each, evaluation.selection.logging_runs={{{runs}}}, or, where the log holds "
            "them, the columns with their propensities, "
            f"evaluation.selection.logging_columns={{{columns}}}"
        )
    return None


def check_named(
    names: BehaviorNames | None, given: Mapping[str, str], option: str
) -> tuple[str, ...]:
    """What is given, in the order of the log's behaviour policies.

    Raises ConfigError where the two do not name the same policies.
    """
    if names is None:
        raise ConfigError(
            f"evaluation.selection.{option} names behaviour policies, and the log's schema names "
            "no column 'behavior_policy'; for a log of one policy use "
            "evaluation.selection.logging_run"
        )
    missing = [name for name in names.name if name not in given]
    if missing:
        rows = names.rows[names.name.index(missing[0])]
        raise ConfigError(
            f"evaluation.selection.{option} lacks the behaviour policy '{missing[0]}', which "
            f"logged {rows:,} rows; it has {_listed(given)}, the log has {_listed(names.name)}"
        )
    unknown = [name for name in given if name not in names.name]
    if unknown:
        raise ConfigError(
            f"evaluation.selection.{option} names '{unknown[0]}', which logged no row; the log has "
            f"{_listed(names.name)}"
        )
    return tuple(given[name] for name in names.name)


@dataclass
class LoggingPolicies:
    """The runs whose policies logged the rows: one for all, or one for each behaviour policy.

    place: of each run's directory. names: of the behaviour policies; None for a single run.
    tolerance: largest relative distance of a probability from the logged one, with `names`.
    """

    place: tuple[str, ...]
    scorers: list[PolicyScorer]
    names: BehaviorNames | None = None
    tolerance: float = 0.02

    @classmethod
    def open(
        cls,
        options: EvaluationConfig,
        names: BehaviorNames | None,
        catalogue: Catalogue,
        trust_code: Collection[str] = (),
    ) -> LoggingPolicies | None:
        """Those that the configuration names; None where it names none.

        Raises:
            ConfigError: a behaviour policy without a run, or the reverse; two options that exclude
                each other.
            RunError: a run is not there or not finished.
        """
        chosen = options.selection
        if chosen.logging_runs is not None:
            if chosen.logging_run is not None:
                raise ConfigError(
                    "evaluation.selection has logging_run and logging_runs; the first says that "
                    "one policy made the whole log, so name one of the two"
                )
            place = check_named(names, chosen.logging_runs, "logging_runs")
        elif chosen.logging_run is not None:
            place, names = (chosen.logging_run,), None
        else:
            return None
        runs = [open_run(Path(one), catalogue, trust_code) for one in place]
        scorers = [PolicyScorer(run.policy, run.items) for run in runs]
        return cls(place, scorers, names, chosen.logging_tolerance)

    @torch.no_grad()
    def check_start(self, log: Log, catalogue: Catalogue, rows: int) -> None:
        """`check` on the log's first rows, before anything is computed on the rest."""
        for number, scorer in enumerate(self.scorers):
            encoding = scorer.policy.context_encoding
            first = next(iter(scan(log, catalogue, encoding, rows, prefetch=False)))
            own = first.take(np.flatnonzero(self.owner(first) == number))
            if self.names is not None and len(own):
                context = self.embed(number, own)
                terms = scorer.policy.terms(context, scorer.items, torch.from_numpy(own.action))
                self.check(number, own, terms.log_prob.double().numpy())

    def owner(self, rows: EncodedRows) -> Integers:
        """(n,) which of the policies logged each row."""
        if self.names is None:
            return np.zeros(len(rows), dtype=np.int64)
        assert rows.behavior_policy is not None
        return self.names.index(rows.behavior_policy)

    def policy(self, number: int) -> TwoTowerPolicy:
        return self.scorers[number].policy

    def items(self, number: int) -> ItemEmbeddings:
        return self.scorers[number].items

    @torch.no_grad()
    def embed(self, number: int, rows: EncodedRows) -> Tensor:
        """(n, d) contexts, from rows in that run's own encoding."""
        return self.policy(number).embed_contexts(to_tensors(rows.context))

    def check(self, number: int, rows: EncodedRows, log_prob: Floats) -> Floats:
        """(n,) distances of a policy's log-probabilities (n,) of rows that it logged from the
        logged ones.

        Raises DataError, naming rows and values, where runs are named for behaviour policies; a
        single run that did not make the log is only refused, from all rows' distances (`refusal`).
        """
        assert rows.pscore is not None
        distance: Floats = np.abs(log_prob - np.log(rows.pscore))
        if self.names is None:
            return distance
        check_logged(
            rows.row,
            rows.pscore,
            np.exp(log_prob),
            self.tolerance,
            f"the run '{self.place[number]}', which evaluation.selection.logging_runs names for "
            f"the behaviour policy '{self.names.name[number]}',",
            "name the run that logged these rows; where the policy that was served was not the "
            "run's own (exploration on the side, another temperature), log its propensities in "
            "columns and name these in evaluation.selection.logging_columns",
        )
        return distance

    def refusal(self, off: Sequence[Floats]) -> str | None:
        """Why the single run did not make the log; None where it may have.

        off: what `check` returned.
        """
        if self.names is not None or not off:
            return None
        distance = float(np.median(np.concatenate(off)))
        if distance <= WRONG_PROPENSITY:
            return None
        return (
            "evaluation.selection.logging_run did not make this log: its probabilities of the "
            f"logged items differ from the logged ones by a factor of {np.exp(distance):.3g} "
            "(median); PAS-IF and the support check use logged propensities only"
        )


class LoggingColumns:
    """Each behaviour policy's propensity of the logged item, from columns of the log.

    Rows asked for in the order of the log are read once; a jump costs the row group jumped into.
    """

    def __init__(self, log: Log, names: BehaviorNames | None, options: SelectionConfig) -> None:
        assert options.logging_columns is not None
        self.columns = check_named(names, options.logging_columns, "logging_columns")
        assert names is not None
        self.names, self.tolerance, self._log = names, options.logging_tolerance, log
        self._group, self._first = -1, 0
        self._values = np.zeros((0, len(self.columns)))
        self._append()
        # What can be refused is refused now, before anything is computed.
        schema = log.schema
        assert schema.behavior_policy is not None
        if schema.pscore is not None:
            first = log.read_row_group(0, [schema.behavior_policy, schema.pscore])
            owner = names.index(hashed(first.column(schema.behavior_policy)))
            pscore = as_float_array(first.column(schema.pscore))
            self._check(self._values, owner, pscore, np.arange(len(owner)))

    def of(self, rows: EncodedRows) -> Floats:
        """(n, P) probabilities of a batch.

        Raises DataError for a value that is no probability, or one that is not the logged one.
        """
        if not self._first <= int(rows.row[0]) <= self._first + len(self._values):
            self._seek(int(rows.row[0]))
        while self._first + len(self._values) <= int(rows.row[-1]):
            self._append()
        found = self._values[rows.row - self._first]
        keep = int(rows.row[-1]) + 1 - self._first
        self._values, self._first = self._values[keep:], self._first + keep
        assert rows.behavior_policy is not None
        self._check(found, self.names.index(rows.behavior_policy), rows.pscore, rows.row)
        return found

    def _check(self, found: Floats, owner: Integers, pscore: Floats | None, row: Integers) -> None:
        assert pscore is not None
        for number, name in enumerate(self.names.name):
            own = np.flatnonzero(owner == number)
            check_logged(
                row[own],
                pscore[own],
                found[own, number],
                self.tolerance,
                f"the column '{self.columns[number]}', which evaluation.selection.logging_columns "
                f"names for the behaviour policy '{name}',",
                "on its own rows it must hold what the column of logged propensities holds",
            )

    def __getstate__(self) -> dict[str, Any]:
        """What another process reads columns with: no values."""
        return {**self.__dict__, "_group": -1, "_first": 0, "_values": self._values[:0]}

    def _seek(self, row: int) -> None:
        first = self._log.first_rows
        group = int(np.searchsorted(first, row, side="right")) - 1
        self._group, self._first, self._values = group - 1, int(first[group]), self._values[:0]

    def _append(self) -> None:
        self._group += 1
        table = self._log.read_row_group(self._group, list(dict.fromkeys(self.columns)))
        for column in self.columns:
            if column not in table.column_names:
                raise ConfigError(
                    f"evaluation.selection.logging_columns names the column '{column}', which the "
                    f"log '{self._log.location(self._group)[0]}' does not have"
                )
        values = np.stack([as_float_array(table.column(name)) for name in self.columns], axis=1)
        bad = ~((values >= 0.0) & (values <= 1.0 + 1e-9))
        if bad.any():
            row, place = (int(x) for x in np.argwhere(bad)[0])
            raise DataError(
                f"column '{self.columns[place]}' is {values[row, place]} in row "
                f"{int(self._log.first_rows[self._group]) + row} of the log; a propensity lies in "
                "[0, 1]"
            )
        self._values = np.concatenate([self._values, values])


def check_logged(
    row: Integers, pscore: Floats, probability: Floats, tolerance: float, what: str, remedy: str
) -> None:
    """Raise DataError, naming rows and values, where probabilities (n,) are not the logged ones."""
    wrong = np.flatnonzero(np.abs(probability - pscore) > tolerance * pscore)
    if wrong.size == 0:
        return
    worst = wrong[:_SHOWN]
    told = "; ".join(
        f"row {row[i]}: logged {pscore[i]:.6g}, found {probability[i]:.6g}" for i in worst
    )
    raise DataError(
        f"{what} does not give the probabilities that were logged. {told}. Of {len(row):,} rows "
        f"compared in one batch {wrong.size:,} differ by more than {100 * tolerance:g} % "
        f"(evaluation.selection.logging_tolerance); {remedy}"
    )


def _listed(names: Sequence[str] | Mapping[str, str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
