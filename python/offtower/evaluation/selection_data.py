"""Estimator selection on an evaluated log: the rows that it keeps, and the choice per policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offtower.config import SelectionConfig
from offtower.data.log import ParquetLog
from offtower.errors import ConfigError
from offtower.evaluation.behavior.probes import PasifSample
from offtower.evaluation.rows import Array, EvaluationRows, IntArray, ModelPredictions
from offtower.evaluation.scoring.batches import ScoredBatch
from offtower.evaluation.selection import (
    METHODS,
    BehaviorDraws,
    BehaviorPolicies,
    DensePolicies,
    NetworkOptions,
    Problem,
    SelectionComparison,
    SelectionLog,
    compare_selectors,
    default_candidates,
)
from offtower.evaluation.selection.problem import SlateColumns


def check_selection(select: str | None, log: ParquetLog, options: SelectionConfig) -> None:
    """Refuse what cannot be selected, before anything is computed.

    Raises ConfigError for an unknown selector or a log that is too long.
    """
    if select is None:
        return
    if select not in (*METHODS, "all"):
        raise ConfigError(f"--select must be one of {', '.join(METHODS)} or all, got '{select}'")
    if log.schema.weight is not None:
        raise ConfigError(
            f"--select has no form for rows with weights (column '{log.schema.weight}'); evaluate "
            "without it, or on a log that was not down-sampled"
        )
    if log.num_rows > options.max_rows:
        raise ConfigError(
            f"estimator selection keeps numbers of every row in memory, and this log has "
            f"{log.num_rows:,} rows; pass a part of it with --log (offtower.data.split_log cuts "
            f"one), or raise evaluation.selection.max_rows ({options.max_rows:,})"
        )


@dataclass(frozen=True)
class SelectionRows:
    """The n rows of a log as a selection needs them: a few float64 numbers for each.

    row: number in the log. weight: by policy. predictions: by policy and reward model.
    """

    row: IntArray
    reward: Array
    weight: dict[str, Array]
    predictions: dict[str, dict[str, ModelPredictions]]
    slates: dict[str, SlateColumns] | None = None
    """By policy, for a log of slates."""

    @classmethod
    def of(cls, batch: ScoredBatch) -> SelectionRows:
        """The rows of a batch."""
        first = next(iter(batch.rows.values()))
        return cls(
            batch.encoded[0].row,
            first.reward,
            {name: one.weighted.importance_weight for name, one in batch.scored.items()},
            {name: one.predictions for name, one in batch.scored.items()},
            None
            if first.round is None
            else {name: _slate_columns(one.weighted) for name, one in batch.scored.items()},
        )

    def problem(self, policy: str, row: IntArray | None = None) -> Problem:
        """The rows as one policy sees them; row: numbers in the log of those to take."""
        index = slice(None) if row is None else np.isin(self.row, row)
        models = {
            name: ModelPredictions(one.action_reward[index], one.expected_reward[index])
            for name, one in self.predictions[policy].items()
        }
        slates = None if self.slates is None else self.slates[policy]
        return Problem(self.weight[policy][index], self.reward[index], models, slates)


def _slate_columns(rows: EvaluationRows) -> SlateColumns:
    assert rows.round is not None and rows.slate_weight is not None
    return SlateColumns(rows.round, rows.earlier_weight, rows.slate_weight)


@dataclass(frozen=True)
class SelectionData:
    """The rows of an evaluated log, and what is known of the policies that made it.

    pasif, heuristic: measured on the logging policies; None where these are not known.
    heuristic_refusal: why the heuristic cannot run. item_features: (N, e), for the network.
    """

    rows: SelectionRows
    pasif: PasifSample | None
    heuristic: BehaviorPolicies | None
    heuristic_refusal: str | None
    item_features: Array | None

    def select(
        self, policy: str, select: str, options: SelectionConfig, seed: int
    ) -> SelectionComparison:
        """Choose an estimator for a policy, among the default candidates tuned by SLOPE."""
        problem = self.rows.problem(policy)
        # The reward models were fitted on the training log, which this one is not.
        independent = frozenset(problem.models)
        log = SelectionLog(problem, None, self.heuristic, independent)
        pasif: dict[str, Any] = {"share": options.share, "repetitions": options.repetitions}
        logs: dict[str, SelectionLog] = {}
        if self.pasif is not None:
            rows = self.rows.problem(policy, self.pasif.row)
            source = self._source(policy, self.pasif)
            logs["pasif"] = SelectionLog(rows, source, independent_models=independent)
            if options.importance_fit == "network":
                pasif["network"] = NetworkOptions(epochs=options.network_steps)
        refusal = self.heuristic_refusal
        methods = list(METHODS) if select == "all" else [select]
        failed = {} if refusal is None else {"heuristic": refusal}
        if problem.slates is not None:
            methods = [m for m in methods if m != "pasif"]
            failed = {"heuristic": refusal or "", "pasif": refusal or ""}
        found = compare_selectors(
            log,
            default_candidates(log.problem),
            methods=[m for m in methods if m != "heuristic" or refusal is None],
            seed=seed,
            options={"pasif": pasif},
            logs=logs,
        )
        return replace(found, failed={**found.failed, **failed}) if failed else found

    def _source(self, policy: str, sample: PasifSample) -> DensePolicies | BehaviorDraws:
        predictions: Mapping[str, Any] = sample.predictions
        if sample.behavior is None:
            weight: Any = sample.weight[policy]
            return BehaviorDraws(weight, predictions)
        return DensePolicies(
            sample.behavior,
            sample.target[policy],
            sample.action,
            predictions,
            sample.context,
            self.item_features,
        )
