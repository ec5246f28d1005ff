"""Scores of learners for scikit-learn's model selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offtower.learner.learner import TwoTowerPolicyLearner


@dataclass(frozen=True)
class OffPolicyScorer:
    """An off-policy estimate of a fitted learner's value on held-out rows; greater is better.

    Pass it as `scoring` to `GridSearchCV` and `cross_val_score`, with `y` by
    `offtower.learner.logged_feedback`.

    Attributes:
        estimator: a name of `offtower.evaluation.estimators.ESTIMATORS` that needs no reward model
            and no parameter, such as ips or snips.
        lower_bound: score by the lower end of the normal interval, which penalizes policies whose
            value is uncertain.
        confidence: of that interval.
    """

    estimator: str = "snips"
    lower_bound: bool = False
    confidence: float = 0.95

    def __call__(
        self,
        learner: TwoTowerPolicyLearner,
        X: Any,
        y: Any = None,
        reward: Any = None,
        pscore: Any = None,
    ) -> float:
        found = learner.evaluate(
            X,
            y,
            reward,
            pscore,
            estimators=[self.estimator],
            confidence=self.confidence,
            intervals=("normal",),
        )
        estimate = found.policies["learner"].estimates[self.estimator]
        if self.lower_bound:
            return float(estimate.intervals["normal"].low)
        return float(estimate.estimate.value)
