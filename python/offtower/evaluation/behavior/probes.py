"""What an evaluation gathers of the policies that made the log, where it knows them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from offtower import ops
from offtower.config import Config
from offtower.data.catalogue import Catalogue
from offtower.data.log import ParquetLog
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError
from offtower.evaluation.behavior.policies import (
    BehaviorNames,
    LoggingColumns,
    LoggingPolicies,
    heuristic_refusal,
)
from offtower.evaluation.decision.diagnostics import SupportDiagnostics, support_probe
from offtower.evaluation.scoring.policy import ModelTerms, PolicyScorer, Scored
from offtower.evaluation.scoring.sampling import logits_at
from offtower.evaluation.selection import BehaviorPolicies
from offtower.evaluation.selection_buffer import LoggingDraws
from offtower.seeds import derive_seed

Floats = NDArray[np.float64]

SUPPORT_ROWS = 2_000
"""Rows whose support is probed: evenly spaced ones of a longer log."""
SUPPORT_DRAWS = 10
"""Items drawn from each judged policy for each of them."""


@dataclass
class LoggingGathered:
    """What is gathered of rows with the policies that made the log; a part of the log's, or all.

    Attributes:
        off: distances of the logging policies' probabilities from the logged ones.
        log_target, log_behavior: by judged policy, of items drawn from it on some rows, its own
            log-probabilities and those of the policy that logged the row.
        owner: which behaviour policy logged each row.
        probability: (n, P) each behaviour policy's probability of the logged item.
        expected: by reward model, (n, P) expected rewards of the behaviour policies.
    """

    off: list[Floats] = field(default_factory=list)
    log_target: dict[str, list[Floats]] = field(default_factory=dict)
    log_behavior: dict[str, list[Floats]] = field(default_factory=dict)
    owner: list[NDArray[np.int64]] = field(default_factory=list)
    probability: list[Floats] = field(default_factory=list)
    expected: dict[str, list[Floats]] = field(default_factory=dict)

    def absorb(self, other: LoggingGathered) -> None:
        """Add what was gathered of later rows."""
        for mine, others in (
            (self.log_target, other.log_target),
            (self.log_behavior, other.log_behavior),
            (self.expected, other.expected),
        ):
            for name, parts in others.items():
                mine.setdefault(name, []).extend(parts)
        self.off += other.off
        self.owner += other.owner
        self.probability += other.probability


class SupportWatch:
    """Draws items from the judged policies, and asks the logging policies how likely they are."""

    def __init__(self, policies: LoggingPolicies, num_rows: int, seed: int) -> None:
        self._policies, self._num_rows, self._seed = policies, num_rows, seed
        self._stride = max(1, -(-num_rows // SUPPORT_ROWS))

    @torch.no_grad()
    def add(
        self,
        number: int,
        judged: Mapping[str, tuple[PolicyScorer, Scored]],
        made_by: Sequence[EncodedRows],
        gathered: LoggingGathered,
    ) -> None:
        """A batch, the rows also in the encoding of each logging policy. number: of the batch."""
        taken = np.flatnonzero(made_by[0].row % self._stride == 0)
        if taken.size == 0:
            return
        drawn = {}
        for place, (name, (scorer, scored)) in enumerate(judged.items()):
            seed = derive_seed(self._seed, "support draws", place, number)
            drawn[name], log_target = ops.sample_softmax(
                scored.context_embedding[taken],
                scorer.items.embedding,
                temperature=scorer.policy.temperature,
                item_bias=scorer.items.bias,
                generator=torch.Generator().manual_seed(seed),
                num_samples=SUPPORT_DRAWS,
            )
            gathered.log_target.setdefault(name, []).append(log_target.double().numpy())
        log_behavior = {name: np.empty(items.shape) for name, items in drawn.items()}
        owner = self._policies.owner(made_by[0].take(taken))
        off = np.empty(len(owner))
        for place, batch in enumerate(made_by):
            own = np.flatnonzero(owner == place)
            if own.size == 0:
                continue
            rows = batch.take(taken[own])
            policy, items = self._policies.policy(place), self._policies.items(place)
            context = self._policies.embed(place, rows)
            terms = policy.terms(context, items, torch.from_numpy(rows.action))
            off[own] = self._policies.check(place, rows, terms.log_prob.double().numpy())
            for name, chosen in drawn.items():
                logit = logits_at(context, items, chosen[own], policy.temperature)
                log_behavior[name][own] = logit - terms.log_normalizer[:, None].double()
        gathered.off.append(off)
        for name, values in log_behavior.items():
            gathered.log_behavior.setdefault(name, []).append(values)

    def finish(self, gathered: LoggingGathered) -> dict[str, SupportDiagnostics]:
        """By judged policy."""
        # Rounding in float32 puts a probability of almost 1 above it.
        return {
            name: support_probe(
                np.exp(np.minimum(np.concatenate(gathered.log_behavior[name]), 0.0)),
                np.exp(np.minimum(np.concatenate(targets), 0.0)),
                num_rows=self._num_rows,
            )
            for name, targets in gathered.log_target.items()
        }


@dataclass(frozen=True)
class HeuristicWatch:
    """What the heuristic needs of each row, from runs or from columns of the log."""

    source: LoggingPolicies | LoggingColumns
    draws: int
    seed: int

    def add(
        self,
        number: int,
        rows: EncodedRows,
        made_by: Sequence[EncodedRows],
        models: ModelTerms,
        gathered: LoggingGathered,
    ) -> None:
        """A batch, with the reward models' terms. made_by: it in the encoding of each run."""
        if isinstance(self.source, LoggingColumns):
            gathered.probability.append(self.source.of(rows))
            assert rows.behavior_policy is not None
            gathered.owner.append(self.source.names.index(rows.behavior_policy))
            return
        owner = self.source.owner(rows)
        probability = np.empty((len(rows), len(made_by)))
        expected: dict[str, Floats] = {}
        for place, batch in enumerate(made_by):
            seed = derive_seed(self.seed, "behavior draws", place, number)
            scored = self.source.scorers[place].score_models(
                batch,
                models.exact,
                at_draws=models.at_draws,
                pairs=models.pairs,
                draws=self.draws,
                generator=torch.Generator().manual_seed(seed),
            )
            log_weight = scored.rows[""].log_weight
            assert log_weight is not None and batch.pscore is not None
            log_prob = log_weight + np.log(batch.pscore)
            own = np.flatnonzero(owner == place)
            self.source.check(place, batch.take(own), log_prob[own])
            probability[:, place] = np.exp(log_prob)
            for name, part in scored.rows.items():
                if part.expected_reward is not None:
                    columns = expected.setdefault(name, np.empty(probability.shape))
                    columns[:, place] = part.expected_reward
        gathered.owner.append(owner)
        gathered.probability.append(probability)
        for name, columns in expected.items():
            gathered.expected.setdefault(name, []).append(columns)

    @staticmethod
    def finish(gathered: LoggingGathered) -> BehaviorPolicies:
        """All rows' numbers: (P + 1) float64 a row, and P for each reward model."""
        return BehaviorPolicies(
            np.concatenate(gathered.owner),
            np.concatenate(gathered.probability),
            {name: np.concatenate(parts) for name, parts in gathered.expected.items()},
        )


@dataclass
class LoggingSide:
    """The policies that made the log, and what is asked of them batch by batch.

    It can be sent to another process; what it finds goes into a `LoggingGathered`.

    policies: their runs, where these are known. heuristic_refusal: why the heuristic cannot run.
    """

    policies: LoggingPolicies | None = None
    support: SupportWatch | None = None
    draws: LoggingDraws | None = None
    heuristic: HeuristicWatch | None = None
    heuristic_refusal: str | None = None

    @classmethod
    def open(
        cls,
        select: str | None,
        log: ParquetLog,
        catalogue: Catalogue,
        config: Config,
        trust_code: Collection[str] = (),
    ) -> LoggingSide:
        """What the configuration names and the selector needs.

        Raises ConfigError, saying what to add, where the selector is the heuristic and cannot run;
        and as `LoggingPolicies.open` and `LoggingColumns`.
        """
        options = config.evaluation.selection
        columns = options.logging_columns is not None
        if columns and options.logging_runs is not None:
            raise ConfigError(
                "evaluation.selection has logging_runs and logging_columns, which say the same in "
                "two ways; name one of the two"
            )
        named = columns or options.logging_runs is not None
        if named and config.evaluation.propensities == "estimate":
            raise ConfigError(
                "evaluation.selection.logging_runs and logging_columns are checked against the "
                "logged propensities, and evaluation.propensities=estimate says that there are none"
            )
        names = None
        if select in ("heuristic", "all") or named:
            names = BehaviorNames.of(log)
        side = cls(LoggingPolicies.open(config.evaluation, names, catalogue, trust_code))
        if side.policies is not None:
            side.policies.check_start(log, catalogue, config.evaluation.batch_rows)
            side.support = SupportWatch(side.policies, log.num_rows, config.seed)
            if select in ("pasif", "all"):
                side.draws = LoggingDraws.of(side.policies, log.num_rows, options)
        elif options.importance_fit == "network" and select in ("pasif", "all"):
            raise ConfigError(
                "evaluation.selection.importance_fit=network needs the policy that logged over all "
                "items: name its run in evaluation.selection.logging_run or logging_runs"
            )
        source = LoggingColumns(log, names, options) if columns else side.policies
        if select not in ("heuristic", "all"):
            return side
        side.heuristic_refusal = heuristic_refusal(names, options)
        if side.heuristic_refusal is None:
            assert source is not None
            side.heuristic = HeuristicWatch(source, config.evaluation.draws, config.seed)
        elif select == "heuristic":
            raise ConfigError(f"--select heuristic: {side.heuristic_refusal}")
        return side

    @property
    def scorers(self) -> list[PolicyScorer]:
        """Of the policies that logged; the rows are read in the encoding of each."""
        return [] if self.policies is None else self.policies.scorers

    def refusal(self, gathered: LoggingGathered) -> str | None:
        """Why the run that was named did not make the log."""
        return None if self.policies is None else self.policies.refusal(gathered.off)

    def found_support(self, gathered: LoggingGathered) -> dict[str, SupportDiagnostics]:
        """By judged policy; nothing where the policies that logged are not known."""
        if self.support is None or self.refusal(gathered) is not None:
            return {}
        return self.support.finish(gathered)
