"""One evaluation as it runs: what it prepares, how its rows are judged, and what it gathers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from offtower.config import Config
from offtower.data.catalogue import Catalogue
from offtower.data.log import ParquetLog
from offtower.evaluation.behavior.probes import LoggingSide
from offtower.evaluation.estimator_settings import (
    evaluation_options,
    make_estimators,
    tuned,
    wanted_estimators,
)
from offtower.evaluation.evaluate import EvaluationSums
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.plan import HISTOGRAM_EDGES, BatchScorer, ByPolicy
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.run_loading import ModelRoom, OpenRun, distinct_names
from offtower.evaluation.scoring.clusters import ClusterScorer, item_clusters
from offtower.evaluation.scoring.policy import JudgingModel, PolicyScorer, concatenate
from offtower.evaluation.scoring.propensities import (
    LoggedProbability,
    estimate_logged,
    propensity_note,
)
from offtower.evaluation.selection import SelectionComparison
from offtower.mapping import Mapper, merge_all, pieces
from offtower.models.reward.dense import flatten
from offtower.progress import Progress, watched

__all__ = ["HISTOGRAM_EDGES", "Judge"]

PILOT_ROWS = 65_536
"""Rows on which SLOPE chooses parameters."""


class Judge:
    """One evaluation: what it reads, and what it gathers."""

    def __init__(
        self, runs: list[OpenRun], log: ParquetLog, catalogue: Catalogue, config: Config
    ) -> None:
        self.runs, self.log, self.catalogue, self.config = runs, log, catalogue, config
        self.options = config.evaluation
        self.names = distinct_names(runs)
        self.scorers = [PolicyScorer(run.policy, run.items) for run in runs]
        self.notes: list[str] = []
        self.models: list[JudgingModel] = []
        self.main: JudgingModel | None = None
        self.propensities: LoggedProbability | None = None
        self.clusters: list[ClusterScorer] = []
        self.cluster_probability: LoggedProbability | None = None
        self.logging = LoggingSide()

    def prepare(self, select: str | None, progress: Progress) -> None:
        """Models, estimated propensities, clusters: all that must be there before the rows."""
        config, options = self.config, self.options
        self.logging = LoggingSide.open(
            select, self.log, self.catalogue, config, self.runs[0].trust_code
        )
        room = ModelRoom(self.runs, config, progress)
        self.main = room.main()
        self.models = [] if self.main is None else [self.main]
        if select is not None:
            self.models = room.for_selection(self.main, self.notes)
        self.wanted = wanted_estimators(options, self.main is not None, self.notes)
        encoding = self.runs[0].policy.context_encoding
        if options.propensities == "estimate":
            self.propensities = estimate_logged(
                self.log, self.catalogue, encoding, None, config.seed, progress
            )
            self.notes.append(propensity_note(self.propensities.found))
        if any(one.name == "mips" for one in self.wanted):
            assert options.clusters is not None
            label = item_clusters(options.clusters, self.catalogue, self.scorers[0], config.seed)
            self.clusters = [ClusterScorer(scorer, label) for scorer in self.scorers]
            self.cluster_probability = estimate_logged(
                self.log, self.catalogue, encoding, label, config.seed, progress
            )
            self.notes.append(
                f"mips: {label.max() + 1} clusters, whose probabilities under the logging policy "
                "are estimates; no interval covers their error"
            )
        self.scorer = self._scorer(select is not None)
        self.gathered = self.scorer.gathering()

    def _scorer(self, select: bool) -> BatchScorer:
        options = self.options
        return BatchScorer(
            names=self.names,
            encodings=[run.policy.context_encoding for run in self.runs],
            scorers=self.scorers,
            log=self.log,
            catalogue=self.catalogue,
            batch_rows=options.batch_rows,
            models=self.models,
            main="" if self.main is None else self.main.name,
            draws=options.draws,
            at_draws=options.expected_reward == "draws",
            propensities=self.propensities,
            clusters=self.clusters,
            cluster_probability=self.cluster_probability,
            logging=self.logging,
            select=select,
            seed=self.config.seed,
        )

    def judge(self, mapper: Mapper, progress: Progress) -> EvaluationResult:
        """Judge all rows: here a batch at a time, or in parts wherever the mapper runs. Both merge
        the batches' sums in the same tree, and give the same bits."""
        progress.start("judging", self.log.num_rows)
        merged = merge_all(
            self._parts(mapper, progress) if mapper.distributed else self._batches(progress)
        )
        progress.finish()
        return merged.finish(self.logging.found_support(self.gathered.logging))

    def _batches(self, progress: Progress) -> Iterator[EvaluationSums]:
        waiting: list[ByPolicy] = []
        options: EvaluationOptions | None = None
        pilot = self._pilot_rows
        for by_policy in self.scorer.scored(range(self.scorer.num_batches), self.gathered):
            waiting.append(by_policy)
            progress.advance(next(iter(by_policy.values())).n)
            if options is None:
                if sum(next(iter(batch.values())).n for batch in waiting) < pilot:
                    continue
                options = self._options(waiting)
            while waiting:
                yield EvaluationSums.of(waiting.pop(0), options)
        if waiting:
            options = self._options(waiting)
            while waiting:
                yield EvaluationSums.of(waiting.pop(0), options)

    def _parts(self, mapper: Mapper, progress: Progress) -> Iterator[EvaluationSums]:
        scorer = self.scorer
        # Parameters are chosen here, on the rows that the first part judges once more.
        pilot = min(max(1, -(-self._pilot_rows // scorer.batch_rows)), scorer.num_batches)
        options = self._options(list(scorer.scored(range(pilot), scorer.gathering())))
        parts = pieces(scorer.num_batches, scorer.part_batches, mapper.workers)
        found = mapper.map(partial(scorer.judge, options), parts, "judging")
        for part in watched(found, progress):
            self.gathered.absorb(part.gathered)
            yield part.sums

    @property
    def _pilot_rows(self) -> int:
        return PILOT_ROWS if tuned(self.wanted) else 0

    def _options(self, pilot: Sequence[ByPolicy]) -> EvaluationOptions:
        rows = {name: concatenate([batch[name] for batch in pilot]) for name in self.names}
        estimators = make_estimators(self.wanted, rows, self.notes)
        return evaluation_options(
            self.options,
            estimators,
            self.log.schema.reward_range,
            self.config.seed,
            self.propensities is not None,
        )

    def choose(self, select: str | None, progress: Progress) -> dict[str, SelectionComparison]:
        """By policy, which estimator to believe."""
        if select is None:
            return {}
        side, gathered = self.logging, self.gathered
        behavior = None if side.heuristic is None else side.heuristic.finish(gathered.logging)
        progress.start("choosing an estimator", len(self.names))
        found = {}
        for name in self.names:
            found[name] = gathered.kept.pop(name).choose(
                select,
                self.options.selection,
                self.config.seed,
                refused={"pasif": self.refusal(), "heuristic": side.heuristic_refusal},
                behavior=behavior,
                item_features=self._item_features(),
            )
            progress.advance(1)
        progress.finish()
        return found

    def refusal(self) -> str | None:
        """Why the run that was named did not make the log, once its rows were judged."""
        return self.logging.refusal(self.gathered.logging)

    def _item_features(self) -> NDArray[np.float64] | None:
        """(N, e) for the network, which tells items apart by their features."""
        if self.options.selection.importance_fit != "network":
            return None
        n, encoding = self.catalogue.num_items, self.runs[0].policy.item_encoding
        return flatten(encoding, encoding.encode(self.catalogue.table(0, n)), n, "catalogue")

    def same_log(self) -> bool:
        """Whether some policy learned from the log that it is judged on."""
        learned = set()
        for run in self.runs:
            learned.add(run.directory.manifest().get("data_fingerprint", {}).get("train"))
        return self.log.fingerprint in learned
