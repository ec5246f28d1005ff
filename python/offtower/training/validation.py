"""Judge the policy in training on a held-out log, off-policy: never by an oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from offtower.config import TrainingConfig
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.evaluation.estimators import make_estimator
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.ops.types import RewardTerms
from offtower.prepare import PreparedData
from offtower.training.distributed import ALONE, Workers

SCAN_ROWS = 4096


@dataclass(frozen=True)
class ValidationScore:
    """An off-policy estimate of the policy's value on the validation log."""

    value: float
    low: float
    high: float
    estimator: str
    effective_sample_size: float


class RowScorer(Protocol):
    """A frozen policy that weighs logged rows."""

    def score(self, rows: EncodedRows, reward: RewardTerms | None = None) -> EvaluationRows:
        """Weights, rewards and reward-model terms of the rows."""


class Validator:
    """Scores policies on `data.validation`; with several workers, each scores its share.

    Args:
        data: its `validation` log must exist and have propensities.
        config: names the estimator.
        reward_model: for estimators that need one.
        workers: those that call it together.
        scorer: policy -> what scores rows. Where the scorer itself needs all workers for each
            batch, `together` says so.
    """

    def __init__(
        self,
        data: PreparedData,
        config: TrainingConfig,
        confidence: float,
        reward_model: RewardModel | None,
        workers: Workers = ALONE,
        scorer: Callable[[TwoTowerPolicy], RowScorer] | None = None,
        *,
        together: bool = False,
    ) -> None:
        self._data = data
        self._config = config
        self._confidence = confidence
        self._estimator = make_estimator(config.validation_estimator)
        self._reward_model = reward_model if self._estimator.needs_reward_model else None
        self._workers = workers
        self._scorer = scorer or (
            lambda policy: PolicyScorer(policy, data.items, config.item_chunk)
        )
        self._spread = workers.size > 1 and not together
        assert data.validation is not None
        self._batches = None
        if data.validation.num_rows <= 262_144:
            # Small logs are encoded once.
            self._batches = list(self._scan())

    def __call__(self, policy: TwoTowerPolicy) -> ValidationScore:
        scorer = self._scorer(policy)
        model = self._reward_model
        parts = [
            scorer.score(batch, None if model is None else model.for_new_rows(batch))
            for number, batch in enumerate(self._batches or self._scan())
            if not self._spread or number % self._workers.size == self._workers.rank
        ]
        if self._spread:
            # Back in the log's order, so that the estimate is that of one process.
            turns = self._workers.gather_objects(parts)
            most = max(len(turn) for turn in turns)
            parts = [turn[i] for i in range(most) for turn in turns if i < len(turn)]
        rows = EvaluationRows.concatenate(parts)
        estimate = self._estimator.estimate(rows)
        interval = self._estimator.interval(rows, confidence=self._confidence)
        weight = rows.importance_weight
        square = float((weight**2).sum())
        return ValidationScore(
            value=estimate.value,
            low=interval.low,
            high=interval.high,
            estimator=self._config.validation_estimator,
            effective_sample_size=float(weight.sum()) ** 2 / square if square > 0 else 0.0,
        )

    def _scan(self) -> Iterator[EncodedRows]:
        data = self._data
        assert data.validation is not None
        return scan(
            data.validation,
            data.catalogue,
            data.context_encoding,
            SCAN_ROWS,
            on_bad_rows=data.on_bad_rows,
            quarantine=data.quarantine_of("validation"),
        )
