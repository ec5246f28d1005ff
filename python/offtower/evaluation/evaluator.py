"""Evaluate policies on a log: plan what is needed, then stream the rows through the plan."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.atomic import sha256_file
from offtower.config import Config
from offtower.data.catalogue import Catalogue
from offtower.data.columns import hashed
from offtower.data.encoding import FeatureEncoding
from offtower.data.log import ParquetLog
from offtower.errors import DataError
from offtower.evaluation.accumulators import EvaluationAccumulators
from offtower.evaluation.baselines import Baselines, baseline_options
from offtower.evaluation.behavior.loggers import Loggers
from offtower.evaluation.behavior.plan import BehaviorPlan
from offtower.evaluation.options import (
    EvaluationOptions,
    evaluation_options,
    make_estimators,
    needs_pilot,
    usable_estimators,
)
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.rows import Array, EvaluationRows
from offtower.evaluation.run_loading import (
    EvaluatedPolicy,
    OpenRun,
    distinct_names,
    evaluated_policies,
)
from offtower.evaluation.samples import joined
from offtower.evaluation.scoring.batches import BatchScorer, LogSource
from offtower.evaluation.scoring.clock import LogClock
from offtower.evaluation.scoring.clusters import ClusterWeights, ItemClusters, item_clusters
from offtower.evaluation.scoring.embedded_items import embed_on_workers
from offtower.evaluation.scoring.pair_models import EXACT_PAIRS
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.evaluation.scoring.propensities import estimate_logged
from offtower.evaluation.scoring.reward_models import RewardModelProvider
from offtower.evaluation.scoring.rewards import EvaluationModel, RewardModels
from offtower.evaluation.selection import SelectionComparison
from offtower.evaluation.selection_data import SelectionData, SelectionRows
from offtower.evaluation.slate_options import (
    examination_note,
    position_weights,
    rounds_kind,
    slate_note,
)
from offtower.evaluation.sums import EvaluationSums
from offtower.execution import Execution
from offtower.mapping import Mapper, MergeTree, pieces
from offtower.models.reward.dense import flatten
from offtower.prepare import log_schema
from offtower.progress import Progress, report_rows
from offtower.serving.limits import new_items

PILOT_ROWS = 65_536
"""Rows on which SLOPE chooses parameters."""
_PAIRS = 2e11
"""Contexts times items that a worker scores in a part: about a minute of one core."""
_PART_ROWS = 1_048_576


@dataclass(frozen=True)
class EvaluationPlan:
    """All that the rows are evaluated with; it can be sent to another process.

    Attributes:
        scorer: scores batches with the evaluated policies.
        behavior: what is measured on the policies that made the log.
        options: estimators, intervals, gate.
        baselines: simple policies to compare with.
        select: estimator selector to run; None for none.
        notes: for the reader of the report.
    """

    scorer: BatchScorer
    behavior: BehaviorPlan
    options: EvaluationOptions
    baselines: Baselines
    select: str | None
    notes: tuple[str, ...]

    @property
    def part_batches(self) -> int:
        """Batches of a part for one worker: whole row groups, and no part takes hours."""
        source = self.scorer.source
        policies = len(self.scorer.policies)
        if self.behavior.heuristic is not None:
            policies += len(self.behavior.encodings)
        by_cost = _PAIRS / (source.catalogue.num_items * policies)
        group_rows = float(source.log.row_group_sizes.mean())
        rows = max(group_rows, min(by_cost, _PART_ROWS))
        return max(1, round(rows / source.batch_rows))

    def accumulators(self) -> EvaluationAccumulators:
        """Nothing accumulated yet."""
        scorer = self.scorer
        return EvaluationAccumulators(list(scorer.policies), scorer.source, scorer.seed)


@dataclass(frozen=True)
class PartialEvaluation:
    """Sums over a part of the log; None where no round of slates begins in it."""

    rows: int
    sums: EvaluationSums | None
    accumulated: EvaluationAccumulators


def evaluate_part(
    plan: EvaluationPlan, numbers: range, advance: Callable[[int], None] = lambda rows: None
) -> PartialEvaluation:
    """Evaluate the batches with these numbers. advance: called with the rows of each."""
    accumulated, sums, count = plan.accumulators(), MergeTree[EvaluationSums](), 0
    simple = baseline_options(plan.options)
    for batch in plan.scorer.batches(numbers, plan.behavior.encodings):
        accumulated.add(
            batch,
            plan.behavior.measure(batch, plan.scorer.rewards.models),
            None if plan.select is None else SelectionRows.of(batch),
        )
        sums.add(EvaluationSums.of(batch.rows, plan.options))
        baselines = plan.baselines.rows(batch.encoded[0])
        accumulated.baselines.add(EvaluationSums.of(baselines, simple))
        count += len(batch)
        advance(len(batch))
    return PartialEvaluation(count, sums.merged() if count else None, accumulated)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the policies of `runs` on a log, as they are served.

    config: its section `evaluation` says how; its seed is that of all draws.
    also: further ways to serve each policy, as in `evaluated_policies`.
    """

    runs: tuple[OpenRun, ...]
    log: ParquetLog
    catalogue: Catalogue
    config: Config
    also: tuple[str, ...] = ()

    @cached_property
    def policies(self) -> dict[str, EvaluatedPolicy]:
        """By name, the evaluated policies: those that are served first."""
        return evaluated_policies(self.runs, self.also)

    def plan(
        self, select: str | None, progress: Progress, mapper: Mapper | None = None
    ) -> EvaluationPlan:
        """Fit reward models, estimate propensities, choose parameters by SLOPE on the first rows.

        mapper: embeds the items and fits reward models where it runs in other processes; by default
            this one does.
        Raises ConfigError for what the configuration or the log rules out.
        """
        config, options = self.config, self.config.evaluation
        encoding = self.runs[0].policy.context_encoding
        source = LogSource(self.log, self.catalogue, options.batch_rows)
        execution = Execution(mapper or Mapper(), progress)
        policies = self._scorers(execution)
        behavior = BehaviorPlan.of(select, source, config, self.runs[0])
        rewards, notes = self._reward_models(select, execution)
        kind = rounds_kind(self.log)
        estimators, left_out = usable_estimators(
            options, has_reward_model=rewards.main is not None, pscore_kind=kind
        )
        notes += left_out
        if kind is not None:
            notes += [slate_note(kind), *examination_note(rewards.main_model)]
        estimate = partial(
            estimate_logged, self.log, self.catalogue, encoding, seed=config.seed, progress=progress
        )
        propensities = estimate(label=None) if options.propensities == "estimate" else None
        if propensities is not None:
            notes.append(propensities.estimated.warning)
        clusters = None
        if any(one.name == "mips" for one in estimators):
            assert options.clusters is not None
            first = next(iter(policies.values()))
            label = item_clusters(options.clusters, self.catalogue, first, config.seed)
            clusters = ClusterWeights(ItemClusters(label), estimate(label=label))
            notes.append(
                f"mips: {label.max() + 1} clusters, whose probabilities under the logging policy "
                "are estimates; no interval covers their error"
            )
        alpha = position_weights(options, kind)
        notes += [] if alpha is None else [alpha.note]
        loggers = Loggers.open(source, config, estimators, self.runs[0].trust_code)
        scorer = BatchScorer(
            source,
            policies,
            rewards,
            propensities,
            clusters,
            config.seed,
            alpha,
            loggers,
            LogClock.of(self.log),
        )
        pilot = _pilot_rows(scorer) if needs_pilot(estimators) else {}
        made, tuning_notes = make_estimators(estimators, pilot, loggers)
        reward_range = self.log.schema.reward_range
        evaluation = evaluation_options(
            options,
            made,
            reward_range if alpha is None else alpha.range(reward_range),
            config.seed,
            propensities_estimated=propensities is not None,
            reward_names=tuple(one.name for one in self.log.schema.rewards),
        )
        baselines, missing = self._baselines(encoding, progress)
        notes += tuning_notes + missing
        return EvaluationPlan(scorer, behavior, evaluation, baselines, select, tuple(notes))

    def run(
        self, plan: EvaluationPlan, execution: Execution
    ) -> tuple[EvaluationResult, EvaluationAccumulators]:
        """Stream all rows through a plan, here or in parts wherever the mapper runs.

        Both merge the batches' sums in the same tree, so the result has the same bits.
        """
        mapper, progress = execution.mapper, execution.progress
        batches = plan.scorer.source.num_batches
        progress.start("evaluating", self.log.num_rows)
        if mapper.distributed:
            accumulated, sums = plan.accumulators(), MergeTree[EvaluationSums]()
            ranges = pieces(batches, plan.part_batches, mapper.workers)
            parts = mapper.map(partial(evaluate_part, plan), ranges, "evaluating")
            for part in report_rows(parts, progress):
                accumulated.merge(part.accumulated)
                if part.sums is not None:
                    sums.add(part.sums)
            merged = sums.merged()
        else:
            whole = evaluate_part(plan, range(batches), progress.advance)
            assert whole.sums is not None, "a log has rows"
            accumulated, merged = whole.accumulated, whole.sums
        progress.finish()
        support = plan.behavior.found_support(accumulated.behavior)
        also = [name for name, one in self.policies.items() if one.also is not None]
        return merged.finish(support, may_leave_out=also), accumulated

    def select(
        self,
        plan: EvaluationPlan,
        names: Collection[str],
        accumulated: EvaluationAccumulators,
        progress: Progress,
    ) -> dict[str, SelectionComparison]:
        """Choose an estimator for each named policy; empty where the plan has no selector."""
        if plan.select is None:
            return {}
        behavior = accumulated.behavior
        pasif = [one.pasif for one in behavior if one.pasif is not None]
        heuristic = [one.heuristic for one in behavior if one.heuristic is not None]
        data = SelectionData(
            joined(accumulated.selection),
            joined(pasif) if pasif and plan.behavior.refusal(behavior) is None else None,
            joined(heuristic) if heuristic else None,
            plan.behavior.heuristic_refusal,
            self._item_features(),
        )
        progress.start("choosing an estimator", len(names))
        found = {}
        for name in names:
            options = self.config.evaluation.selection
            found[name] = data.select(name, plan.select, options, self.config.seed)
            progress.advance(1)
        progress.finish()
        return found

    def learned_from_log(self) -> bool:
        """Whether some policy was trained on the evaluated log."""
        return any(_trained_on(run).get("train") == self.log.fingerprint for run in self.runs)

    def changed_catalogue(self) -> list[str]:
        """Names of the runs that were trained with another catalogue than this one."""
        names = distinct_names(self.runs)
        return [
            name
            for name, run in zip(names, self.runs, strict=True)
            if _trained_on(run).get("catalogue", self.catalogue.fingerprint)
            != self.catalogue.fingerprint
        ]

    def _baselines(
        self, encoding: FeatureEncoding, progress: Progress
    ) -> tuple[Baselines, list[str]]:
        """Baselines from the training log, or uniform alone where it is no longer there."""
        try:
            train = ParquetLog.open(self.config.data.train, log_schema(self.config))
            return Baselines.fit(train, self.catalogue, encoding, progress), []
        except DataError as error:
            note = (
                "the reports' lists of most rewarded items are missing, since the training log "
                f"cannot be read: {error}"
            )
            return Baselines(self.catalogue.num_items), [note]

    def _scorers(self, execution: Execution) -> dict[str, PolicyScorer]:
        """By name; policies of one run share its embedded items."""
        of_run: dict[int, PolicyScorer] = {}
        found = {}
        for name, one in self.policies.items():
            run, limits = one.run, one.serving.new_items
            new = None if limits is None else new_items(limits, run.policy.item_encoding, run.items)
            scorer = of_run.get(id(run))
            if scorer is None:
                embedded = embed_on_workers(
                    run.policy, self.catalogue, run.directory.path, execution
                )
                scorer = PolicyScorer(run.policy, embedded or run.items)
                of_run[id(run)] = scorer
            found[name] = scorer.served_as(one.serving, _served_logs(one), new)
        return found

    def _reward_models(
        self, select: str | None, execution: Execution
    ) -> tuple[RewardModels, list[str]]:
        options = self.config.evaluation
        provider = RewardModelProvider(self.runs, self.config, execution)
        main = provider.main()
        models: list[EvaluationModel] = [] if main is None else [main]
        notes: list[str] = []
        if select is not None:
            models, notes = provider.for_selection(main)
        at_draws = options.expected_reward == "draws"
        pairs = self.log.num_rows * self.catalogue.num_items
        rewards = RewardModels(
            tuple(models),
            None if main is None else main.name,
            at_draws,
            at_draws or pairs > EXACT_PAIRS,
            options.draws,
        )
        return rewards, notes

    def _item_features(self) -> Array | None:
        """(N, e) features of the items, for the network."""
        if self.config.evaluation.selection.importance_fit != "network":
            return None
        n, encoding = self.catalogue.num_items, self.runs[0].policy.item_encoding
        return flatten(encoding, encoding.encode(self.catalogue.table(0, n)), n, "catalogue")


def _served_logs(one: EvaluatedPolicy) -> NDArray[np.uint64] | None:
    """Keys of the logs that exports of a deterministic policy wrote."""
    return served_logs(one) if one.serving.mode == "top_k" else None


def served_logs(one: EvaluatedPolicy) -> NDArray[np.uint64]:
    """Keys, as `EncodedRows.behavior_policy` has them, of logs that a policy's exports wrote."""
    from offtower.retrieval.manifest import logged_names

    directory = one.run.directory
    weights = sha256_file(directory.policy / "policy.safetensors")
    names = logged_names(directory.path / "export", weights, one.serving)
    return hashed(pa.chunked_array([pa.array(names, pa.string())]))


def _trained_on(run: OpenRun) -> dict[str, str]:
    """Fingerprints of the logs and the catalogue of the training, by name."""
    found: dict[str, str] = run.directory.manifest().get("data_fingerprint", {})
    return found


def _pilot_rows(scorer: BatchScorer) -> dict[str, EvaluationRows]:
    """By policy, the log's first rows, up to the batch that completes PILOT_ROWS."""
    source = scorer.source
    count = min(-(-PILOT_ROWS // source.batch_rows), source.num_batches)
    batches = [batch.rows for batch in scorer.batches(range(count))]
    return {
        name: EvaluationRows.concatenate([rows[name] for rows in batches])
        for name in scorer.policies
    }
