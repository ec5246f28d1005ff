"""Off-policy validation of the policy in training on a held-out log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from offtower.config import Config, TrainingConfig
from offtower.data.row_sketch import RowSketch
from offtower.data.rows import EncodedRows
from offtower.evaluation.estimators import make_estimator
from offtower.evaluation.intervals import simultaneous_confidence
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.evaluation.scoring.weighted_rows import context_rows
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.ops.types import RewardTerms
from offtower.prepare import PreparedData
from offtower.training.workers import SINGLE_PROCESS, Workers

_SCAN_ROWS = 4096
_KEPT_ROWS = 262_144


@dataclass(frozen=True)
class ValidationScore:
    """An off-policy estimate of the policy's value on the validation log.

    Attributes:
        low, high: normal interval of this validation alone. Training keeps the weights with the
            largest `low`, which therefore is no bound on their value.
        simultaneous_low, simultaneous_high: gamma interval that holds for all validations of a
            training at once (Bonferroni), and so for the weights that are kept. A normal one is a
            point where all rows of large weight have one reward, as the best of many often do.
    """

    value: float
    low: float
    high: float
    simultaneous_low: float
    simultaneous_high: float
    estimator: str
    effective_sample_size: float


def planned_validations(settings: TrainingConfig) -> int:
    """Number of validations of a training that is not stopped early."""
    return -(-settings.epochs // settings.validate_every_epochs)


class RowScorer(Protocol):
    """Computes importance weights of a frozen policy."""

    def score(self, rows: EncodedRows, reward: RewardTerms | None = None) -> EvaluationRows:
        """Weights, rewards and reward-model terms of the rows."""


class Validator:
    """Scores policies, as they are served, on the validation log; workers score their shares.

    Args:
        data: its `validation` log must exist and have propensities.
        config: names the estimator, the confidence of the interval, and how policies are served.
        reward_model: for estimators that need one.
        workers: call it together.
        collective_scorer: policy -> a scorer that needs all workers for each batch; None scores
            each batch on one worker.
    """

    def __init__(
        self,
        data: PreparedData,
        config: Config,
        reward_model: RewardModel | None,
        workers: Workers = SINGLE_PROCESS,
        collective_scorer: Callable[[TwoTowerPolicy], RowScorer] | None = None,
    ) -> None:
        self._data = data
        self._confidence = config.evaluation.confidence
        self._simultaneous = simultaneous_confidence(
            self._confidence, planned_validations(config.training)
        )
        self._estimator_name = config.training.validation_estimator
        self._estimator = make_estimator(self._estimator_name)
        self._reward_model = reward_model if self._estimator.needs_reward_model else None
        self._workers = workers
        self._scorer = collective_scorer or (
            lambda policy: PolicyScorer(
                policy, data.items, config.training.item_chunk, config.serving
            )
        )
        self._spread = workers.size > 1 and collective_scorer is None
        assert data.validation is not None
        self._reward_range = data.validation.schema.reward_range
        # Small logs are encoded once.
        small = data.validation.num_rows <= _KEPT_ROWS
        self.sketch: RowSketch | None = None
        """Of the validation log, once it has been read."""
        self._batches = list(self._scan()) if small else None

    def __call__(self, policy: TwoTowerPolicy) -> ValidationScore:
        scorer = self._scorer(policy)
        model = self._reward_model
        parts = [
            _scored(scorer, batch, model, one_a_round=isinstance(scorer, PolicyScorer))
            for number, batch in enumerate(self._batches or self._scan())
            if not self._spread or number % self._workers.size == self._workers.rank
        ]
        if self._spread:
            # In the order of the log, so that the estimate equals that of one process.
            turns = self._workers.gather_objects(parts)
            most = max(len(turn) for turn in turns)
            parts = [turn[i] for i in range(most) for turn in turns if i < len(turn)]
        rows = EvaluationRows.concatenate(parts)
        estimate = self._estimator.estimate(rows)
        interval = self._estimator.interval(rows, confidence=self._confidence)
        simultaneous = self._estimator.interval(
            rows, self._simultaneous, "gamma", reward_range=self._reward_range
        )
        weight = rows.importance_weight
        square = float((weight**2).sum())
        return ValidationScore(
            value=estimate.value,
            low=interval.low,
            high=interval.high,
            simultaneous_low=simultaneous.low,
            simultaneous_high=simultaneous.high,
            estimator=self._estimator_name,
            effective_sample_size=float(weight.sum()) ** 2 / square if square > 0 else 0.0,
        )

    def _scan(self) -> Iterator[EncodedRows]:
        """The log's batches; the first pass also makes its sketch."""
        if self.sketch is not None:
            yield from self._data.scan(_SCAN_ROWS, "validation")
            return
        sketch = RowSketch.empty()
        for batch in self._data.scan(_SCAN_ROWS, "validation", sketched=True):
            assert batch.content is not None, "the scan is sketched"
            sketch = sketch.with_keys(batch.content)
            yield replace(batch, content=None)
        self.sketch = sketch


def _scored(
    scorer: RowScorer, rows: EncodedRows, model: RewardModel | None, *, one_a_round: bool
) -> EvaluationRows:
    """Rows with predictions times the examination of their positions.

    one_a_round: the scorer reads one context for each round of slates.
    """
    if model is None:
        return scorer.score(rows)
    scored = scorer.score(rows, model.for_new_rows(context_rows(rows) if one_a_round else rows))
    factor = None if rows.rounds is None else model.examination(rows)
    if factor is None or scored.action_reward is None or scored.expected_reward is None:
        return scored
    times = factor.double().cpu().numpy()
    return replace(
        scored,
        action_reward=scored.action_reward * times,
        expected_reward=scored.expected_reward * times,
    )
