"""Logs of several behavior policies: which one logged a row, and balanced propensities."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from offtower.config import Config, EstimatorConfig
from offtower.data.encoding import FeatureEncoding
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError, DataError
from offtower.evaluation.behavior.columns import LoggingColumns
from offtower.evaluation.behavior.names import BehaviorNames
from offtower.evaluation.behavior.policies import LoggingPolicies
from offtower.evaluation.estimators import ESTIMATORS, LoggerWeighted
from offtower.evaluation.rows import Array, IntArray

if TYPE_CHECKING:
    from offtower.evaluation.scoring.batches import LogSource


@dataclass(frozen=True)
class Loggers:
    """The behavior policies that a log names.

    source: of every policy's probability of the logged item, for balanced propensities; None where
        each row keeps its own.
    """

    names: BehaviorNames
    source: LoggingColumns | LoggingPolicies | None = None

    @classmethod
    def open(
        cls,
        source: LogSource,
        config: Config,
        estimators: Sequence[EstimatorConfig],
        trust_code: Collection[str] = (),
    ) -> Loggers | None:
        """The policies of a log; None where nothing that is configured tells them apart.

        Raises ConfigError, saying what to add, where the log or the configuration lacks what
        evaluation.propensities=balanced or an estimator needs.
        """
        balanced = config.evaluation.propensities == "balanced"
        weighted = [
            one.name for one in estimators if issubclass(ESTIMATORS[one.name], LoggerWeighted)
        ]
        if not balanced and not weighted:
            return None
        what = "evaluation.propensities=balanced" if balanced else f"the estimator {weighted[0]}"
        names = BehaviorNames.of(source.log)
        if names is None:
            raise ConfigError(
                f"{what} needs to know which behavior policy logged each row: name the column "
                "under 'behavior_policy' in the section 'log' of the schema"
            )
        return cls(names, _probabilities(source, config, names, trust_code) if balanced else None)

    @property
    def encodings(self) -> list[FeatureEncoding]:
        """In which runs of behavior policies read rows."""
        if not isinstance(self.source, LoggingPolicies):
            return []
        return [scorer.policy.context_encoding for scorer in self.source.scorers]

    def index(self, rows: EncodedRows) -> IntArray:
        """(n,) number of the policy that logged each row."""
        assert rows.behavior_policy is not None
        return self.names.index(rows.behavior_policy)

    def propensity(self, rows: EncodedRows, own: Sequence[EncodedRows]) -> Array | None:
        """(n,) sum_l s_l pi_l(a|x), s_l the share of rows that policy l logged; None where rows
        keep their own propensities.

        own: the rows in each of `encodings`.
        Raises DataError where a policy's probabilities are not those that it logged.
        """
        if self.source is None:
            return None
        if isinstance(self.source, LoggingColumns):
            probability = self.source.of(rows)
        else:
            probability = np.stack(
                [_of_run(self.source, number, batch) for number, batch in enumerate(own)], axis=1
            )
        mixture = probability @ (self.names.rows / self.names.rows.sum())
        if (mixture <= 0.0).any():
            raise DataError(
                f"row {int(rows.row[np.argmax(mixture <= 0.0)])} logged an item that every "
                "behavior policy gives probability 0"
            )
        return np.asarray(mixture)

    def balanced(
        self, encoded: Sequence[EncodedRows], own: Sequence[EncodedRows]
    ) -> tuple[EncodedRows, ...]:
        """The same rows in each encoding, with `propensity` in place of their own where it is
        configured."""
        propensity = self.propensity(encoded[0], own)
        if propensity is None:
            return tuple(encoded)
        return tuple(replace(rows, pscore=propensity) for rows in encoded)


def _of_run(policies: LoggingPolicies, number: int, rows: EncodedRows) -> Array:
    terms = policies.terms(number, policies.embed(number, rows), rows)
    log_prob = terms.log_prob.double().cpu().numpy()
    own = np.flatnonzero(policies.owner(rows) == number)
    policies.check(number, rows.take(own), log_prob[own])
    return np.asarray(np.exp(log_prob))


def _probabilities(
    source: LogSource, config: Config, names: BehaviorNames, trust_code: Collection[str]
) -> LoggingColumns | LoggingPolicies:
    schema, options = source.log.schema, config.evaluation.selection
    if schema.slates or schema.weight is not None:
        kind = "slates" if schema.slates else "rows with weights"
        raise ConfigError(
            f"evaluation.propensities=balanced has no form for {kind}: use logged, and "
            "logger_weighted_ips among the estimators"
        )
    if options.logging_columns is not None:
        return LoggingColumns(source.log, names, options)
    if options.logging_runs is not None:
        found = LoggingPolicies.open(options, names, source.catalogue, trust_code)
        assert found is not None
        return found
    raise ConfigError(
        "evaluation.propensities=balanced needs every behavior policy's probability of each logged "
        "item: name their runs in evaluation.selection.logging_runs, or the columns that hold them "
        "in evaluation.selection.logging_columns. Without either, logger_weighted_ips among the "
        "estimators needs the column behavior_policy only"
    )
