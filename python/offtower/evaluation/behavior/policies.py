"""Runs whose policies logged the rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offtower.config import SelectionConfig
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import to_tensors
from offtower.data.log import Log
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.evaluation.behavior.names import BehaviorNames, check_logged, check_named
from offtower.evaluation.rows import Array, IntArray
from offtower.evaluation.run_loading import open_run
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.ops import Eligibility, PolicyTerms

WRONG_PROPENSITY = 0.01
"""Median distance of log-probabilities beyond which a single run did not make the log."""


@dataclass(frozen=True)
class LoggingPolicies:
    """Runs whose policies logged the rows: one for all rows, or one for each behavior policy.

    path: of each run's directory. names: of the behavior policies; None for a single run.
    tolerance: largest relative distance of a probability from the logged one, with `names`.
    """

    path: tuple[str, ...]
    scorers: tuple[PolicyScorer, ...]
    names: BehaviorNames | None = None
    tolerance: float = 0.02

    @classmethod
    def open(
        cls,
        options: SelectionConfig,
        names: BehaviorNames | None,
        catalogue: Catalogue,
        trust_code: Collection[str] = (),
    ) -> LoggingPolicies | None:
        """Load the runs that the configuration names; None where it names none.

        Raises:
            ConfigError: a behavior policy without a run, or the reverse; two options that exclude
                each other.
            RunError: a run is missing or not finished.
        """
        if options.logging_runs is not None:
            if options.logging_run is not None:
                raise ConfigError(
                    "evaluation.selection has logging_run and logging_runs; the first says that "
                    "one policy made the whole log, so name one of the two"
                )
            path = check_named(names, options.logging_runs, "logging_runs")
        elif options.logging_run is not None:
            path, names = (options.logging_run,), None
        else:
            return None
        runs = [open_run(Path(one), catalogue, trust_code) for one in path]
        scorers = tuple(
            PolicyScorer(run.policy, run.items, serving=run.config.serving) for run in runs
        )
        return cls(path, scorers, names, options.logging_tolerance)

    @torch.no_grad()
    def check_first_rows(self, log: Log, catalogue: Catalogue, count: int) -> None:
        """Refuse runs that did not make the log's first `count` rows, before anything is computed.

        Raises DataError as `check`; a single run is checked later, on more rows (`refusal`).
        """
        if self.names is None:
            return
        for number, scorer in enumerate(self.scorers):
            encoding = scorer.policy.context_encoding
            first = next(iter(scan(log, catalogue, encoding, count, prefetch=False)))
            own = first.take(np.flatnonzero(self.owner(first) == number))
            if len(own):
                terms = self.terms(number, self.embed(number, own), own)
                self.check(number, own, terms.log_prob.double().numpy())

    def owner(self, rows: EncodedRows) -> IntArray:
        """(n,) which of the policies logged each row."""
        if self.names is None:
            return np.zeros(len(rows), dtype=np.int64)
        assert rows.behavior_policy is not None
        return self.names.index(rows.behavior_policy)

    @torch.no_grad()
    def embed(self, number: int, rows: EncodedRows) -> Tensor:
        """(n, d) contexts, from rows in that run's own encoding."""
        return self.scorers[number].policy.embed_contexts(to_tensors(rows.context))

    @torch.no_grad()
    def terms(self, number: int, context: Tensor, rows: EncodedRows) -> PolicyTerms:
        """The policy's terms of rows with embedded contexts (n, d)."""
        scorer = self.scorers[number]
        return scorer.served.terms(
            context,
            scorer.items,
            torch.from_numpy(rows.action),
            eligible=self.eligible(rows),
            position=self.position(rows),
        )

    def log_prob_at(
        self, number: int, context: Tensor, item: Tensor, terms: PolicyTerms, rows: EncodedRows
    ) -> Tensor:
        """(n, S) float64 log-probabilities of items (n, S) in rows with these terms."""
        scorer = self.scorers[number]
        return scorer.served.log_prob_at(
            context,
            scorer.items,
            item,
            terms.log_normalizer,
            eligible=self.eligible(rows),
            position=self.position(rows),
        )

    @staticmethod
    def eligible(rows: EncodedRows) -> Eligibility | None:
        """What the rows could show; None where every item could be shown."""
        return None if rows.eligible is None else rows.eligible.on()

    @staticmethod
    def position(rows: EncodedRows) -> Tensor | None:
        """(n,) positions of the rows; None where the log has none."""
        return None if rows.position is None else torch.from_numpy(rows.position)

    def check(self, number: int, rows: EncodedRows, log_prob: Array) -> Array:
        """Compare a policy's log-probabilities (n,) of rows that it logged with the logged ones.

        Returns (n,) absolute differences. Raises DataError, naming rows and values, where runs are
        named for behavior policies; a single run that did not make the log is only refused, from
        all rows' differences (`refusal`).
        """
        assert rows.pscore is not None
        if self.names is not None:
            check_logged(
                rows.row,
                rows.pscore,
                np.exp(log_prob),
                self.tolerance,
                f"the run '{self.path[number]}', which evaluation.selection.logging_runs names for "
                f"the behavior policy '{self.names.name[number]}',",
                "name the run that logged these rows; where the policy that was served was not the "
                "run's own (exploration on the side, another temperature), log its propensities in "
                "columns and name these in evaluation.selection.logging_columns",
            )
        return np.asarray(np.abs(log_prob - np.log(rows.pscore)))

    def refusal(self, differences: Sequence[Array]) -> str | None:
        """Say why the single run did not make the log; None where it may have.

        differences: what `check` returned.
        """
        if self.names is not None or not differences:
            return None
        median = float(np.median(np.concatenate(differences)))
        if median <= WRONG_PROPENSITY:
            return None
        return (
            "evaluation.selection.logging_run did not make this log: its probabilities of the "
            f"logged items differ from the logged ones by a factor of {np.exp(median):.3g} "
            "(median); PAS-IF and the support check use logged propensities only"
        )
