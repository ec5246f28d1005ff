"""One evaluation as it runs: what it reads, batch by batch, and what it gathers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from offtower.config import Config
from offtower.data.catalogue import Catalogue
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.evaluation.choosing import SelectionKeeper
from offtower.evaluation.clusters import ClusterScorer, item_clusters
from offtower.evaluation.coverage import LogWatch
from offtower.evaluation.draws import RewardTerms
from offtower.evaluation.estimated import (
    LoggedProbability,
    estimate_logged,
    propensity_note,
)
from offtower.evaluation.evaluate import EvaluationSums, merge_all
from offtower.evaluation.logging_side import LoggingSide
from offtower.evaluation.opening import ModelRoom, OpenRun, distinct_names
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.pair_models import EXACT_PAIRS, PairRewardModel
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring import (
    JudgingModel,
    ModelTerms,
    PolicyScorer,
    Scored,
    concatenate,
)
from offtower.evaluation.selection import SelectionComparison
from offtower.evaluation.settings import (
    evaluation_options,
    make_estimators,
    tuned,
    wanted_estimators,
)
from offtower.models.reward.dense import flatten
from offtower.progress import Progress
from offtower.seeds import derive_seed

PILOT_ROWS = 65_536
"""Rows on which SLOPE chooses parameters."""

HISTOGRAM_EDGES = np.linspace(-4.0, 4.0, 49)
"""Bins of log10 of the importance weight; weights beyond count in the first and last."""


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
        self.watch = LogWatch(catalogue.num_items, log.num_rows, config.seed)
        bins = len(HISTOGRAM_EDGES) - 1
        self.histograms = {name: np.zeros(bins, dtype=np.int64) for name in self.names}
        self.kept = {name: SelectionKeeper() for name in self.names}
        self.models: list[JudgingModel] = []
        self.main: JudgingModel | None = None
        self.propensities: LoggedProbability | None = None
        self.clusters: list[ClusterScorer] = []
        self.cluster_probability: LoggedProbability | None = None
        self.logging = LoggingSide()

    def prepare(self, select: str | None, progress: Progress) -> None:
        """Models, estimated propensities, clusters: all that must be there before the rows."""
        config, options = self.config, self.options
        self.logging = LoggingSide.open(select, self.log, self.catalogue, config)
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

    def stream(self, select: str | None, progress: Progress) -> EvaluationResult:
        """Judge all rows, a batch at a time."""
        waiting: list[dict[str, EvaluationRows]] = []
        options: EvaluationOptions | None = None
        pilot = PILOT_ROWS if tuned(self.wanted) else 0

        def sums() -> Iterator[EvaluationSums]:
            nonlocal options
            for by_policy in self._scored(select):
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

        merged = merge_all(sums())
        return merged.finish(self.logging.found_support())

    def _options(self, pilot: Sequence[dict[str, EvaluationRows]]) -> EvaluationOptions:
        rows = {name: concatenate([batch[name] for batch in pilot]) for name in self.names}
        estimators = make_estimators(self.wanted, rows, self.notes)
        return evaluation_options(
            self.options,
            estimators,
            self.log.schema.reward_range,
            self.config.seed,
            self.propensities is not None,
        )

    def _scored(self, select: str | None) -> Iterator[dict[str, EvaluationRows]]:
        """The same logged rows, batch by batch, as seen by each policy."""
        # Each run encodes the log by what it was trained with.
        streams = [
            scan(self.log, self.catalogue, one.policy.context_encoding, self.options.batch_rows)
            for one in (*self.scorers, *self.logging.scorers)
        ]
        batches: tuple[EncodedRows, ...]
        for number, batches in enumerate(zip(*streams, strict=True)):
            if self.propensities is not None:
                batches = tuple(self.propensities.filled(rows) for rows in batches)
            self.watch.add(batches[0])
            models = self._terms(batches)
            scored = [self._score(i, number, batches, models) for i in range(len(self.runs))]
            for i, name in enumerate(self.names):
                self.watch.probe(name, self.scorers[i], scored[i])
                if select is not None:
                    self.kept[name].add(scored[i].rows)
            self._of_logging(number, batches, scored, models)
            main = "" if self.main is None else self.main.name
            by_policy = {name: scored[i].rows[main] for i, name in enumerate(self.names)}
            if self.cluster_probability is not None:
                by_policy = self._with_clusters(by_policy, scored, batches[0])
            for name, rows in by_policy.items():
                self.histograms[name] += _histogram(rows)
            yield by_policy

    def _terms(self, batches: Sequence[EncodedRows]) -> ModelTerms:
        """The reward models on these rows, each in the encoding of the run that owns it."""
        found = ModelTerms({}, {}, {})
        for model in self.models:
            own = batches[model.owner]
            if model.pairs is not None and self._drawn_pairs:
                found.pairs[model.name] = (model.pairs, own)
                continue
            terms = model.over_all(own)
            if model.exact is not None and self.options.expected_reward == "draws":
                found.at_draws[model.name] = terms
            else:
                found.exact[model.name] = terms
        return found

    def _score(
        self, policy: int, number: int, batches: Sequence[EncodedRows], models: ModelTerms
    ) -> Scored:
        seed = derive_seed(self.config.seed, "target draws", policy, number)
        return self.scorers[policy].score_models(
            batches[policy],
            models.exact,
            at_draws=models.at_draws,
            pairs=models.pairs,
            draws=self.options.draws,
            generator=torch.Generator().manual_seed(seed),
        )

    @property
    def _drawn_pairs(self) -> bool:
        """Whether models over pairs are judged at draws in place of all items."""
        cells = self.log.num_rows * self.catalogue.num_items
        return self.options.expected_reward == "draws" or cells > EXACT_PAIRS

    def _of_logging(
        self,
        number: int,
        batches: Sequence[EncodedRows],
        scored: Sequence[Scored],
        models: ModelTerms,
    ) -> None:
        """What is gathered of the policies that made the log; batches holds their rows last."""
        made_by = batches[len(self.runs) :]
        judged = dict(zip(self.names, zip(self.scorers, scored, strict=True), strict=True))
        if self.logging.support is not None:
            self.logging.support.add(number, judged, made_by)
        if self.logging.heuristic is not None:
            self.logging.heuristic.add(number, batches[0], made_by, models)
        if self.logging.draws is not None:
            self._draw(batches, made_by, scored)

    def _draw(
        self,
        batches: Sequence[EncodedRows],
        made_by: Sequence[EncodedRows],
        scored: Sequence[Scored],
    ) -> None:
        assert self.logging.draws is not None
        taken = self.logging.draws.taken(batches[0])
        if taken.size == 0:
            return
        drawn, log_behavior = self.logging.draws.draw([batch.take(taken) for batch in made_by])
        context = None
        if self.options.selection.importance_fit == "network":
            encoding, rows = self.runs[0].policy.context_encoding, batches[0].take(taken)
            context = flatten(encoding, rows.context, len(rows), "log")
        models: dict[str, RewardTerms | tuple[PairRewardModel, EncodedRows]] = {}
        for model in self.models:
            own = batches[model.owner].take(taken)
            models[model.name] = (
                (model.pairs, own) if model.pairs is not None else model.over_all(own)
            )
        for i, name in enumerate(self.names):
            log_target = self.kept[name].add_draws(
                self.scorers[i], scored[i], taken, drawn, log_behavior, models
            )
            if self.logging.draws.every:
                action = batches[0].action[taken]
                self.kept[name].add_every(log_behavior, log_target, action, context)

    def _with_clusters(
        self,
        by_policy: dict[str, EvaluationRows],
        scored: Sequence[Scored],
        batch: EncodedRows,
    ) -> dict[str, EvaluationRows]:
        assert self.cluster_probability is not None
        behavior = self.cluster_probability.of(batch)
        return {
            name: replace(
                by_policy[name],
                cluster_weight=np.exp(self.clusters[i].log_probability(scored[i], batch.action))
                / behavior,
            )
            for i, name in enumerate(self.names)
        }

    def choose(self, select: str | None, progress: Progress) -> dict[str, SelectionComparison]:
        """By policy, which estimator to believe."""
        if select is None:
            return {}
        side = self.logging
        behavior = None if side.heuristic is None else side.heuristic.finish()
        progress.start("choosing an estimator", len(self.names))
        found = {}
        for name in self.names:
            found[name] = self.kept.pop(name).choose(
                select,
                self.options.selection,
                self.config.seed,
                refused={"pasif": side.refusal(), "heuristic": side.heuristic_refusal},
                behavior=behavior,
                item_features=self._item_features(),
            )
            progress.advance(1)
        progress.finish()
        return found

    def _item_features(self) -> np.ndarray | None:
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


def _histogram(rows: EvaluationRows) -> np.ndarray:
    log_weight = rows.log_weight
    assert log_weight is not None
    inside = np.clip(log_weight / np.log(10.0), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return np.histogram(inside, HISTOGRAM_EDGES)[0]
