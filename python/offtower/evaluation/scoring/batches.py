"""Batches of a log, scored by every evaluated policy: a pure function of the batch's number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from offtower.data.catalogue import Catalogue
from offtower.data.eligible import reading_index
from offtower.data.encoding import FeatureEncoding
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.evaluation.behavior.loggers import Loggers
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.clock import LogClock
from offtower.evaluation.scoring.clusters import ClusterWeights
from offtower.evaluation.scoring.external import ColumnScorer
from offtower.evaluation.scoring.policy import PolicyScorer, ScoredRows
from offtower.evaluation.scoring.position_weights import PositionWeights
from offtower.evaluation.scoring.propensities import LoggedProbability
from offtower.evaluation.scoring.rewards import BatchReward, RewardModels
from offtower.evaluation.scoring.weighted_rows import context_rows
from offtower.seeds import derive_seed


@dataclass(frozen=True)
class LogSource:
    """A log and its catalogue, read in batches of `batch_rows` rows."""

    log: ParquetLog
    catalogue: Catalogue
    batch_rows: int

    @property
    def num_batches(self) -> int:
        return -(-self.log.num_rows // self.batch_rows)

    def batches(
        self, numbers: range, encodings: Sequence[FeatureEncoding]
    ) -> Iterator[tuple[int, tuple[EncodedRows, ...]]]:
        """(number, the batch in each of the encodings; the first has the rows' hashes too).

        Batches of slates hold whole rounds (`scan`); those in which none begins are left out.
        """
        last = min(numbers.stop * self.batch_rows, self.log.num_rows)
        rows = range(numbers.start * self.batch_rows, last)
        streams = [
            scan(self.log, self.catalogue, one, self.batch_rows, rows=rows, sketched=not number)
            for number, one in enumerate(encodings)
        ]
        for parts in zip(*streams, strict=True):
            yield int(parts[0].row[0]) // self.batch_rows, parts

    def __getstate__(self) -> dict[str, Any]:
        """A worker needs only the catalogue's map from ids to item numbers."""
        return {**self.__dict__, "catalogue": reading_index(self.catalogue, self.log.schema)}


@dataclass(frozen=True)
class ScoredBatch:
    """The same n logged rows, as each policy sees them.

    Attributes:
        number: of the batch in the log.
        encoded: in the encoding of each evaluated policy, in their order.
        behavior: in the encoding of each known logging policy.
        rewards: the reward models on these rows.
        scored: by evaluated policy.
        rows: by evaluated policy, what the estimators read.
    """

    number: int
    encoded: tuple[EncodedRows, ...]
    behavior: tuple[EncodedRows, ...]
    rewards: dict[str, BatchReward]
    scored: dict[str, ScoredRows]
    rows: dict[str, EvaluationRows]

    def __len__(self) -> int:
        return len(self.encoded[0])


@dataclass(frozen=True)
class BatchScorer:
    """Scores batches; can be sent to another process.

    Attributes:
        source: of the rows.
        policies: by name, the evaluated policies.
        rewards: reward models.
        propensities, clusters: estimates; None where not needed.
        seed: draws of a batch are a function of (seed, policy, number of the batch).
        position_weights: by which rewards in slates count; None is 1 everywhere.
        loggers: the behavior policies, where something tells them apart.
        clock: of the rows' times; None for a log without timestamps.
    """

    source: LogSource
    policies: Mapping[str, PolicyScorer | ColumnScorer]
    rewards: RewardModels
    propensities: LoggedProbability | None
    clusters: ClusterWeights | None
    seed: int
    position_weights: PositionWeights | None = None
    loggers: Loggers | None = None
    clock: LogClock | None = None

    def batches(
        self, numbers: range, behavior: Sequence[FeatureEncoding] = ()
    ) -> Iterator[ScoredBatch]:
        """The batches with these numbers. behavior: encodings of the known logging policies."""
        # Policies of one run share its encoding, and rows are encoded once for them.
        by_id = {
            id(scorer.context_encoding): scorer.context_encoding
            for scorer in self.policies.values()
        }
        encodings, keys = list(by_id.values()), list(by_id)
        owner = [keys.index(id(scorer.context_encoding)) for scorer in self.policies.values()]
        own = [] if self.loggers is None else self.loggers.encodings
        known = len(encodings) + len(behavior)
        for number, batch in self.source.batches(numbers, [*encodings, *behavior, *own]):
            if self.propensities is not None:
                batch = tuple(self.propensities.filled(rows) for rows in batch)
            alpha = None
            if self.position_weights is not None:
                alpha = self.position_weights.of(batch[0])
                batch = tuple(self.position_weights.applied(rows) for rows in batch)
            encoded = tuple(batch[index] for index in owner)
            weighed = encoded
            if self.loggers is not None:
                weighed = self.loggers.balanced(encoded, batch[known:])
            rewards = self.rewards.on(tuple(context_rows(rows) for rows in encoded))
            examinations = self.rewards.examinations(encoded)
            scored = {}
            for i, (name, scorer) in enumerate(self.policies.items()):
                seed = derive_seed(self.seed, "target draws", i, number)
                generator = torch.Generator().manual_seed(seed)
                scored[name] = scorer.score_models(
                    weighed[i], rewards, draws=self.rewards.draws, generator=generator
                )
            scored = {
                name: one.examined(examinations).weighted_by(alpha) for name, one in scored.items()
            }
            rows = {name: one.rows(self.rewards.main) for name, one in scored.items()}
            if self.clusters is not None:
                rows = {
                    name: replace(one, cluster_weight=self.clusters.of(scored[name], encoded[0]))
                    for name, one in rows.items()
                }
            if self.loggers is not None:
                logger = self.loggers.index(encoded[0])
                rows = {name: replace(one, logger=logger) for name, one in rows.items()}
            if self.clock is not None:
                time = self.clock.time(encoded[0].timestamp)
                rows = {name: replace(one, time=time) for name, one in rows.items()}
            measured = batch[len(encodings) : known]
            yield ScoredBatch(number, encoded, measured, rewards, scored, rows)
