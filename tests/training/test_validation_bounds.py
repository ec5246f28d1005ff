"""The lower bound that early stopping keeps holds for the best of all validations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from offtower.config import Config, parse_config
from offtower.evaluation.rows import EvaluationRows
from offtower.training.validation import Validator, planned_validations

ROWS, EPOCHS, TRUTH = 400, 25, 0.5


@dataclass(frozen=True)
class _Batch:
    """Stands for the encoded rows, of which only hashes of the contents are read."""

    content: NDArray[np.uint64] | None = field(
        default_factory=lambda: np.arange(ROWS, dtype=np.uint64)
    )


class _NoiseScorer:
    """Rewards of pure noise: a policy of any weights with mean 1 is worth TRUTH."""

    def __init__(self, world: np.random.Generator) -> None:
        self._world = world
        self.reward = (world.random(ROWS) < TRUTH).astype(np.float64)

    def __call__(self, policy: Any) -> _NoiseScorer:
        return self

    def score(self, rows: Any, reward: Any = None) -> EvaluationRows:
        return EvaluationRows(self._world.gamma(2.0, 0.5, ROWS), self.reward)


def _config(**training: Any) -> Config:
    data = {"train": "memory", "catalogue": "memory"}
    settings = {"epochs": EPOCHS, "validation_estimator": "snips", **training}
    return parse_config({"name": "x", "data": data, "training": settings})


def _validator(config: Config, scorer: _NoiseScorer) -> Validator:
    def scan(*args: Any, **named: Any) -> Iterator[_Batch]:
        yield _Batch()

    schema = SimpleNamespace(reward_range=(0.0, 1.0))
    data: Any = SimpleNamespace(validation=SimpleNamespace(num_rows=ROWS, schema=schema), scan=scan)
    return Validator(data, config, None, collective_scorer=scorer)


def test_largest_bound_exceeds_the_truth_as_rarely_as_stated() -> None:
    # 160 worlds of 25 policies of independent weights. Stated: at most .025. A rate of exactly
    # .025 exceeds the limit of 12 with probability 2e-4; bounds for one validation give .16 here,
    # and stay within it with 1e-3.
    worlds, above, alone = 160, 0, 0
    for seed in range(worlds):
        validate = _validator(_config(), _NoiseScorer(np.random.default_rng(seed)))
        scores = [validate(None) for _ in range(EPOCHS)]  # type: ignore[arg-type]
        above += max(score.simultaneous_low for score in scores) > TRUTH
        alone += max(score.low for score in scores) > TRUTH
    assert above <= 12
    assert alone > 12


def test_the_bound_of_a_policy_that_few_rows_decide_is_no_point() -> None:
    """Two rows of reward 1 have nearly all the weight: the normal interval says 1."""

    class Collapsed(_NoiseScorer):
        def score(self, rows: Any, reward: Any = None) -> EvaluationRows:
            weight = np.full(ROWS, 1e-9)
            weight[np.flatnonzero(self.reward)[:2]] = ROWS / 2
            return EvaluationRows(weight, self.reward)

    score = _validator(_config(), Collapsed(np.random.default_rng(0)))(None)  # type: ignore[arg-type]
    assert score.low > 0.999999 and score.simultaneous_low < TRUTH


def test_weights_are_kept_by_the_interval_of_one_validation() -> None:
    scorer = _NoiseScorer(np.random.default_rng(0))
    one = _validator(_config(epochs=1), scorer)(None)  # type: ignore[arg-type]
    assert one.simultaneous_low == pytest.approx(one.low, abs=0.02)  # A gamma and a normal limit.
    many = _validator(_config(), scorer)(None)  # type: ignore[arg-type]
    assert many.simultaneous_low < many.low < many.value < many.high


@pytest.mark.parametrize(
    ("epochs", "every", "count"), [(25, 1, 25), (7, 3, 3), (6, 3, 2), (1, 5, 1)]
)
def test_planned_validations_count_the_last_epoch(epochs: int, every: int, count: int) -> None:
    assert (
        planned_validations(_config(epochs=epochs, validate_every_epochs=every).training) == count
    )
