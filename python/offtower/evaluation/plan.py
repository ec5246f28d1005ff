"""Batches of a log as the judged policies see them: a pure function of the batches' numbers.

`BatchScorer` holds all that a batch is judged with; it can be sent to another process. What a
process made of its batches comes back as a `Judged`, and those merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.encoding import FeatureEncoding
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.evaluation.behavior.probes import LoggingGathered, LoggingSide
from offtower.evaluation.decision.coverage import LogWatch
from offtower.evaluation.evaluate import EvaluationSums
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.clusters import ClusterScorer
from offtower.evaluation.scoring.pair_models import EXACT_PAIRS, PairRewardModel
from offtower.evaluation.scoring.policy import JudgingModel, ModelTerms, PolicyScorer, Scored
from offtower.evaluation.scoring.propensities import LoggedProbability
from offtower.evaluation.selection_buffer import SelectionKeeper
from offtower.mapping import merge_all
from offtower.models.reward.dense import flatten
from offtower.ops.types import RewardTerms
from offtower.seeds import derive_seed

HISTOGRAM_EDGES = np.linspace(-4.0, 4.0, 49)
"""Bins of log10 of the importance weight; weights beyond count in the first and last."""

_PAIRS = 2e11
"""Contexts times items that a worker scores in a part, about: a minute or so of one core."""
_PART_ROWS = 1_048_576

ByPolicy = dict[str, EvaluationRows]


@dataclass
class Gathered:
    """What is gathered of rows beside the estimators' sums.

    Attributes:
        watch: items shown, propensities.
        histograms: by policy, rows by bin of HISTOGRAM_EDGES.
        kept: by policy, the rows of an estimator selection.
        logging: what the policies that made the log say, where they are known.
    """

    watch: LogWatch
    histograms: dict[str, NDArray[np.int64]]
    kept: dict[str, SelectionKeeper]
    logging: LoggingGathered

    def absorb(self, other: Gathered) -> None:
        """Add what was gathered of later rows."""
        self.watch.absorb(other.watch)
        for name, counts in other.histograms.items():
            self.histograms[name] += counts
            self.kept[name].absorb(other.kept[name])
        self.logging.absorb(other.logging)


@dataclass(frozen=True)
class Judged:
    """What a part of the log says."""

    rows: int
    sums: EvaluationSums
    gathered: Gathered


@dataclass
class BatchScorer:
    """All that batches are judged with.

    Attributes:
        names, encodings, scorers: of the policies.
        log, catalogue: the catalogue's index does.
        batch_rows: rows of a batch; together with the log they say what a batch's number means.
        models: reward models. main: name of that of the estimators, "" without one.
        draws: items drawn from a policy for each row, where models need that.
        at_draws: whether models over all items are judged at such draws too.
        propensities, clusters, cluster_probability: estimates, where they are asked for.
        logging: the policies that made the log, where they are known, and what is asked of them.
        select: whether rows are kept for a selection.
        seed: of all draws; those of a batch are a function of (seed, policy, number of the batch).
    """

    names: list[str]
    encodings: list[FeatureEncoding]
    scorers: list[PolicyScorer]
    log: ParquetLog
    catalogue: Catalogue
    batch_rows: int
    models: list[JudgingModel]
    main: str
    draws: int
    at_draws: bool
    propensities: LoggedProbability | None
    clusters: list[ClusterScorer]
    cluster_probability: LoggedProbability | None
    logging: LoggingSide
    select: bool
    seed: int

    @property
    def num_batches(self) -> int:
        return -(-self.log.num_rows // self.batch_rows)

    @property
    def part_batches(self) -> int:
        """Batches of a part that a worker judges: no row group is read for many parts, and no part
        takes hours."""
        groups = float(self.log.row_group_sizes.mean())
        policies = len(self.names)
        if self.logging.heuristic is not None:
            policies += len(self.logging.scorers)
        by_cost = _PAIRS / (self.catalogue.num_items * policies)
        rows = max(groups, min(by_cost, _PART_ROWS))
        return max(1, round(rows / self.batch_rows))

    def gathering(self) -> Gathered:
        """Nothing gathered yet."""
        bins = len(HISTOGRAM_EDGES) - 1
        return Gathered(
            LogWatch(self.catalogue.num_items, self.log.num_rows, self.seed),
            {name: np.zeros(bins, dtype=np.int64) for name in self.names},
            {name: SelectionKeeper() for name in self.names},
            LoggingGathered(),
        )

    def judge(self, options: EvaluationOptions, numbers: range) -> Judged:
        """The batches with these numbers, one after the other."""
        gathered = self.gathering()
        rows = 0

        def sums() -> Iterator[EvaluationSums]:
            nonlocal rows
            for by_policy in self.scored(numbers, gathered):
                rows += next(iter(by_policy.values())).n
                yield EvaluationSums.of(by_policy, options)

        merged = merge_all(sums())
        return Judged(rows, merged, gathered)

    def scored(self, numbers: range, gathered: Gathered) -> Iterator[ByPolicy]:
        """The same logged rows, batch by batch, as seen by each policy."""
        # Each run encodes the log by what it was trained with.
        made_by = [one.policy.context_encoding for one in self.logging.scorers]
        last = min(numbers.stop * self.batch_rows, self.log.num_rows)
        rows = range(numbers.start * self.batch_rows, last)
        streams = [
            scan(self.log, self.catalogue, encoding, self.batch_rows, rows=rows)
            for encoding in (*self.encodings, *made_by)
        ]
        batches: tuple[EncodedRows, ...]
        for number, batches in zip(numbers, zip(*streams, strict=True), strict=True):
            if self.propensities is not None:
                batches = tuple(self.propensities.filled(rows) for rows in batches)
            gathered.watch.add(batches[0])
            models = self._terms(batches)
            scored = [self._score(i, number, batches, models) for i in range(len(self.names))]
            for i, name in enumerate(self.names):
                if number == 0:
                    gathered.watch.probe(name, self.scorers[i], scored[i])
                if self.select:
                    gathered.kept[name].add(scored[i].rows)
            self._of_logging(number, batches, scored, models, gathered)
            by_policy = {name: scored[i].rows[self.main] for i, name in enumerate(self.names)}
            if self.cluster_probability is not None:
                by_policy = self._with_clusters(by_policy, scored, batches[0])
            for name, policy_rows in by_policy.items():
                gathered.histograms[name] += _histogram(policy_rows)
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
            if model.exact is not None and self.at_draws:
                found.at_draws[model.name] = terms
            else:
                found.exact[model.name] = terms
        return found

    def _score(
        self, policy: int, number: int, batches: Sequence[EncodedRows], models: ModelTerms
    ) -> Scored:
        seed = derive_seed(self.seed, "target draws", policy, number)
        return self.scorers[policy].score_models(
            batches[policy],
            models.exact,
            at_draws=models.at_draws,
            pairs=models.pairs,
            draws=self.draws,
            generator=torch.Generator().manual_seed(seed),
        )

    @property
    def _drawn_pairs(self) -> bool:
        """Whether models over pairs are judged at draws in place of all items."""
        cells = self.log.num_rows * self.catalogue.num_items
        return self.at_draws or cells > EXACT_PAIRS

    def _of_logging(
        self,
        number: int,
        batches: Sequence[EncodedRows],
        scored: Sequence[Scored],
        models: ModelTerms,
        gathered: Gathered,
    ) -> None:
        """What is gathered of the policies that made the log; batches holds their rows last."""
        side, made_by = self.logging, batches[len(self.names) :]
        judged = dict(zip(self.names, zip(self.scorers, scored, strict=True), strict=True))
        if side.support is not None:
            side.support.add(number, judged, made_by, gathered.logging)
        if side.heuristic is not None:
            side.heuristic.add(number, batches[0], made_by, models, gathered.logging)
        if side.draws is not None:
            self._draw(number, batches, scored, gathered)

    def _draw(
        self,
        number: int,
        batches: Sequence[EncodedRows],
        scored: Sequence[Scored],
        gathered: Gathered,
    ) -> None:
        logging = self.logging.draws
        assert logging is not None
        taken = logging.taken(batches[0])
        if taken.size == 0:
            return
        seed = derive_seed(self.seed, "logging draws", number)
        drawn, log_behavior, off = logging.draw(
            [batch.take(taken) for batch in batches[len(self.names) :]],
            torch.Generator().manual_seed(seed),
        )
        gathered.logging.off.append(off)
        context = None
        if logging.network:
            rows = batches[0].take(taken)
            context = flatten(self.encodings[0], rows.context, len(rows), "log")
        models: dict[str, RewardTerms | tuple[PairRewardModel, EncodedRows]] = {}
        for model in self.models:
            own = batches[model.owner].take(taken)
            models[model.name] = (
                (model.pairs, own) if model.pairs is not None else model.over_all(own)
            )
        for i, name in enumerate(self.names):
            keeper = gathered.kept[name]
            log_target = keeper.add_draws(
                self.scorers[i], scored[i], taken, drawn, log_behavior, models
            )
            if logging.every:
                keeper.add_every(log_behavior, log_target, batches[0].action[taken], context)

    def _with_clusters(
        self, by_policy: ByPolicy, scored: Sequence[Scored], batch: EncodedRows
    ) -> ByPolicy:
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

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs: of the catalogue, only the way from ids to numbers."""
        return {**self.__dict__, "catalogue": self.catalogue.bare()}


def _histogram(rows: EvaluationRows) -> NDArray[np.int64]:
    log_weight = rows.log_weight
    assert log_weight is not None
    inside = np.clip(log_weight / np.log(10.0), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return np.histogram(inside, HISTOGRAM_EDGES)[0]
