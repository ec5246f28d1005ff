"""How policies are to be judged."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.decision.gate import GateOptions
from offtower.evaluation.estimators import Estimator
from offtower.evaluation.intervals.methods import check_confidence, simultaneous_confidence
from offtower.evaluation.intervals.smoothing_bound import check_range


@dataclass(frozen=True)
class EvaluationOptions:
    """How to judge.

    Attributes:
        estimators: by which to estimate each policy's value.
        reward_range: least and largest possible reward.
        confidence: of every interval. The verdicts share it (Bonferroni over the policies).
        intervals: methods, of "normal", "bootstrap" and "bernstein"; verdicts use the first.
        decide_by: label or name of the estimator of the verdicts; "auto" is dr, else snips, else
            the first.
        by_user: clusters rows by their user; None does so where rows have users.
        replicates: of the bootstrap; None takes 500, or as many as the confidence needs.
        max_weight: largest possible weight, for "bernstein".
        gate: what a verdict asks for.
        propensities_estimated: the log had no propensities; verdicts say so.
    """

    estimators: tuple[Estimator, ...]
    reward_range: tuple[float, float]
    confidence: float = 0.95
    intervals: tuple[str, ...] = ("normal", "bootstrap")
    decide_by: str = "auto"
    by_user: bool | None = None
    replicates: int | None = None
    seed: int = 0
    max_weight: float | None = None
    gate: GateOptions = field(default_factory=GateOptions)
    propensities_estimated: bool = False

    def __post_init__(self) -> None:
        check_range(self.reward_range)
        check_confidence(self.confidence)
        names = [estimator.name for estimator in self.estimators]
        if not names or len(set(names)) != len(names):
            raise OfftowerError(f"estimators must be some, each once: {names}")
        known = ("normal", "bootstrap", "bernstein")
        if not self.intervals or any(method not in known for method in self.intervals):
            raise OfftowerError(
                f"intervals must be some of {', '.join(known)}, but are {self.intervals}; the "
                "log_smoothing interval is always given"
            )
        self.decider  # noqa: B018 - refuse an unknown one now

    @property
    def decider(self) -> int:
        """Position of the estimator of the verdicts."""
        labels = [estimator.label for estimator in self.estimators]
        if self.decide_by == "auto":
            return next((labels.index(x) for x in ("dr", "snips") if x in labels), 0)
        for i, estimator in enumerate(self.estimators):
            if self.decide_by in (estimator.label, estimator.name):
                return i
        raise OfftowerError(f"decide_by={self.decide_by!r} is none of {', '.join(labels)}")

    def bootstrap_replicates(self, policies: int) -> int:
        """Replicates to carry for intervals of all policies."""
        if "bootstrap" not in self.intervals:
            return 0
        if self.replicates is not None:
            return self.replicates
        level = self.confidence
        if self.intervals[0] == "bootstrap":
            level = simultaneous_confidence(level, policies)
        return max(500, int(np.ceil(10.0 / (1.0 - level) - 1e-9)))
