"""What an evaluation measures on the policies that made the log, as far as they are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offtower.config import Config
from offtower.data.encoding import FeatureEncoding
from offtower.errors import ConfigError
from offtower.evaluation.behavior.columns import LoggingColumns
from offtower.evaluation.behavior.names import BehaviorNames, heuristic_refusal
from offtower.evaluation.behavior.policies import LoggingPolicies
from offtower.evaluation.behavior.probes import (
    HeuristicProbe,
    PasifSample,
    PasifSampler,
    PasifSampling,
    SupportProbe,
    SupportSample,
)
from offtower.evaluation.decision.support import SupportDiagnostics, support_probe
from offtower.evaluation.rows import Array
from offtower.evaluation.run_loading import OpenRun
from offtower.evaluation.samples import joined
from offtower.evaluation.scoring.batches import LogSource, ScoredBatch
from offtower.evaluation.scoring.rewards import EvaluationModel
from offtower.evaluation.selection import BehaviorPolicies


@dataclass(frozen=True)
class BehaviorSample:
    """Measurements on the logging policies over some rows; None where one is not taken."""

    support: SupportSample | None
    pasif: PasifSample | None
    heuristic: BehaviorPolicies | None


@dataclass(frozen=True)
class BehaviorPlan:
    """The known logging policies, and the probes that run on each batch.

    policies: their runs, where these are known. heuristic_refusal: why the heuristic cannot run.
    num_rows: of the log.
    """

    policies: LoggingPolicies | None
    support: SupportProbe | None
    pasif: PasifSampler | None
    heuristic: HeuristicProbe | None
    heuristic_refusal: str | None
    num_rows: int

    @classmethod
    def of(
        cls, select: str | None, source: LogSource, config: Config, run: OpenRun
    ) -> BehaviorPlan:
        """Plan what the configuration names and the selector needs.

        run: the first evaluated one. The network reads contexts in its encoding, and code that it
        may name the logging runs may name too.
        Raises ConfigError, saying what to add, where the selector is the heuristic and cannot run;
        and as `LoggingPolicies.open` and `LoggingColumns`.
        """
        options, log = config.evaluation.selection, source.log
        network = options.importance_fit == "network"
        selects_pasif, selects_heuristic = (select in (m, "all") for m in ("pasif", "heuristic"))
        if selects_pasif and config.evaluation.propensities == "balanced":
            raise ConfigError(
                f"--select {select}: PAS-IF splits rows by their own propensities, and "
                "evaluation.propensities=balanced weights them by others; use paired, ocv, slope "
                "or heuristic"
            )
        if log.schema.slates:
            return _of_slates(select, config, log.num_rows)
        columns = options.logging_columns is not None
        named = columns or options.logging_runs is not None
        _check_exclusive(config)
        names = BehaviorNames.of(log) if selects_heuristic or named else None
        policies = LoggingPolicies.open(options, names, source.catalogue, run.trust_code)
        support = pasif = heuristic = refusal = None
        if policies is not None:
            policies.check_first_rows(log, source.catalogue, source.batch_rows)
            support = SupportProbe(policies, log.num_rows, config.seed)
            if selects_pasif:
                sampling = PasifSampling.of(source.catalogue.num_items, log.num_rows, options)
                encoding = run.policy.context_encoding if network else None
                pasif = PasifSampler(policies, sampling, encoding, config.seed)
        elif network and selects_pasif:
            raise ConfigError(
                "evaluation.selection.importance_fit=network needs the policy that logged over all "
                "items: name its run in evaluation.selection.logging_run or logging_runs"
            )
        known = LoggingColumns(log, names, options) if columns else policies
        if selects_heuristic:
            refusal = heuristic_refusal(names, options)
            if refusal is None:
                assert known is not None
                heuristic = HeuristicProbe(known, config.evaluation.draws, config.seed)
            elif select == "heuristic":
                raise ConfigError(f"--select heuristic: {refusal}")
        return cls(policies, support, pasif, heuristic, refusal, log.num_rows)

    @property
    def encodings(self) -> list[FeatureEncoding]:
        """In which the logging policies read rows."""
        scorers = () if self.policies is None else self.policies.scorers
        return [scorer.policy.context_encoding for scorer in scorers]

    def measure(self, batch: ScoredBatch, models: Sequence[EvaluationModel]) -> BehaviorSample:
        """Run the probes on a batch. models: the evaluation's reward models."""
        number, behavior = batch.number, batch.behavior
        support, pasif, heuristic = self.support, self.pasif, self.heuristic
        return BehaviorSample(
            None if support is None else support.measure(number, batch.scored, behavior),
            None if pasif is None else pasif.measure(batch, models),
            None
            if heuristic is None
            else heuristic.measure(number, batch.encoded[0], behavior, batch.rewards),
        )

    def refusal(self, samples: Sequence[BehaviorSample]) -> str | None:
        """Say why the single run that was named did not make the log; None where it may have."""
        if self.policies is None:
            return None
        found = [one for sample in samples for one in (sample.support, sample.pasif)]
        differences: list[Array] = [one.difference for one in found if one is not None]
        return self.policies.refusal(differences)

    def found_support(self, samples: Sequence[BehaviorSample]) -> dict[str, SupportDiagnostics]:
        """By evaluated policy; empty where the logging policies are not known."""
        found = [sample.support for sample in samples if sample.support is not None]
        if not found or self.refusal(samples) is not None:
            return {}
        sample = joined(found)
        # Rounding in float32 puts a probability of almost 1 above it.
        return {
            name: support_probe(
                np.exp(np.minimum(sample.log_behavior[name], 0.0)),
                np.exp(np.minimum(target, 0.0)),
                num_rows=self.num_rows,
            )
            for name, target in sample.log_target.items()
        }


def _of_slates(select: str | None, config: Config, num_rows: int) -> BehaviorPlan:
    """Nothing is measured on the logging policies of slates.

    Raises ConfigError where the selector or the configuration asks for it.
    """
    options = config.evaluation.selection
    if select in ("pasif", "heuristic"):
        raise ConfigError(f"--select {select}: {_SLATE_REFUSAL}")
    if options.logging_columns is not None or options.logging_runs is not None:
        raise ConfigError(
            "evaluation.selection.logging_runs and logging_columns are not read for a log of "
            "slates; remove them"
        )
    return BehaviorPlan(None, None, None, None, _SLATE_REFUSAL, num_rows)


_SLATE_REFUSAL = (
    "it splits single draws by the policies that made them, and has no form for slates; use "
    "paired, ocv or slope"
)


def _check_exclusive(config: Config) -> None:
    options = config.evaluation.selection
    if options.logging_columns is not None and options.logging_runs is not None:
        raise ConfigError(
            "evaluation.selection has logging_runs and logging_columns, which say the same in two "
            "ways; name one of the two"
        )
    named = options.logging_columns is not None or options.logging_runs is not None
    if named and config.evaluation.propensities == "estimate":
        raise ConfigError(
            "evaluation.selection.logging_runs and logging_columns are checked against the logged "
            "propensities, and evaluation.propensities=estimate says that there are none"
        )
