"""Judge the policy in training on a held-out log, off-policy: never by an oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from offtower.config import TrainingConfig
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.evaluation.estimators import make_estimator
from offtower.evaluation.scoring import PolicyScorer, concatenate
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.prepare import PreparedData

SCAN_ROWS = 4096


@dataclass(frozen=True)
class ValidationScore:
    """An off-policy estimate of the policy's value on the validation log."""

    value: float
    low: float
    high: float
    estimator: str
    effective_sample_size: float


class Validator:
    """Scores policies on `data.validation`.

    Args:
        data: its `validation` log must exist and have propensities.
        config: names the estimator.
        reward_model: for estimators that need one.
    """

    def __init__(
        self,
        data: PreparedData,
        config: TrainingConfig,
        confidence: float,
        reward_model: RewardModel | None,
    ) -> None:
        self._data = data
        self._config = config
        self._confidence = confidence
        self._estimator = make_estimator(config.validation_estimator)
        self._reward_model = reward_model if self._estimator.needs_reward_model else None
        assert data.validation is not None
        self._batches = None
        if data.validation.num_rows <= 262_144:
            # Small logs are encoded once.
            self._batches = list(self._scan())

    def __call__(self, policy: TwoTowerPolicy) -> ValidationScore:
        scorer = PolicyScorer(policy, self._data.items, self._config.item_chunk)
        model = self._reward_model
        rows = concatenate(
            scorer.score(batch, None if model is None else model.for_new_rows(batch))
            for batch in self._batches or self._scan()
        )
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
