"""Results of an evaluation: plain numbers for the report and for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from offtower.evaluation.decision.calibration import Calibration
from offtower.evaluation.decision.gate import Verdict, best_exit_code
from offtower.evaluation.decision.support import SupportDiagnostics
from offtower.evaluation.decision.weights import PositionWeight, WeightDiagnostics
from offtower.evaluation.intervals.methods import DEFAULT_METHOD, Interval
from offtower.evaluation.intervals.statistics import Estimate

if TYPE_CHECKING:
    from offtower.evaluation.drift.result import TimeResult
    from offtower.evaluation.looks import Looks


@dataclass(frozen=True)
class Gap:
    """A paired difference of two values.

    interval: at the stated confidence. simultaneous: so that those of all policies cover at once.
    rounding: size of a difference that the rounding of log-probabilities explains.
    """

    estimate: Estimate
    interval: Interval
    simultaneous: Interval
    rounding: float = 0.0

    def within(self, possible: tuple[float, float]) -> Gap:
        """With gamma intervals cut to possible values; the other methods are not cut."""
        if self.interval.method != DEFAULT_METHOD:
            return self
        return replace(
            self,
            interval=self.interval.within(*possible),
            simultaneous=self.simultaneous.within(*possible),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.estimate.to_dict(),
            "interval": self.interval.to_dict(),
            "simultaneous": self.simultaneous.to_dict(),
        }


@dataclass(frozen=True)
class EstimatorResult:
    """One estimator on one policy.

    difference: to the logging policy. consistent: whether its bias vanishes with more rows.
    """

    name: str
    label: str
    estimate: Estimate
    intervals: dict[str, Interval]
    difference: Gap | None = None
    consistent: bool = True

    @property
    def interval(self) -> Interval:
        """By the first configured method that this estimator has."""
        return next(iter(self.intervals.values()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "estimator": self.name,
            "label": self.label,
            **self.estimate.to_dict(),
            "intervals": {method: i.to_dict() for method, i in self.intervals.items()},
            "difference": None if self.difference is None else self.difference.to_dict(),
            "consistent": self.consistent,
        }


@dataclass(frozen=True)
class PolicyEvaluation:
    """Everything about one policy.

    guaranteed_value, guaranteed_difference: logarithmic-smoothing intervals, which hold for every
    number of rows; None where rows are clustered by user.
    """

    policy: str
    estimates: dict[str, EstimatorResult]
    guaranteed_value: Interval | None
    guaranteed_difference: Interval | None
    weights: WeightDiagnostics
    calibration: Calibration | None
    support: SupportDiagnostics | None
    verdict: Verdict
    sensitivity: float | None = None
    """Factor by which estimated propensities may be wrong before the estimate leaves its side."""
    positions: tuple[PositionWeight, ...] = ()
    """Mean weights by position; empty for rows that are no slates."""
    rewards: dict[str, EstimatorResult] = field(default_factory=dict)
    """By named reward, the policy's value in it; empty without named rewards."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "estimates": {name: e.to_dict() for name, e in self.estimates.items()},
            "guaranteed_value": _dict(self.guaranteed_value),
            "guaranteed_difference": _dict(self.guaranteed_difference),
            "diagnostics": {
                "weights": self.weights.to_dict(),
                "calibration": _dict(self.calibration),
                "support": _dict(self.support),
                **({"positions": [p.to_dict() for p in self.positions]} if self.positions else {}),
            },
            "verdict": self.verdict.to_dict(),
            "sensitivity": self.sensitivity,
            **_named(self.rewards, "rewards"),
        }


@dataclass(frozen=True)
class Comparison:
    """first - second, paired, by the deciding estimator."""

    first: str
    second: str
    estimator: str
    difference: Gap

    def to_dict(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "second": self.second,
            "estimator": self.estimator,
            **self.difference.to_dict(),
        }


@dataclass(frozen=True)
class EvaluationResult:
    """Policies on one log.

    Attributes:
        n, users: rows (rounds, for slates), and users where intervals are by user.
        logging: the logging policy's own value, the mean reward.
        decide_by: name of the estimator of the verdicts.
        policies: by name, in the order given. comparisons: of each two of them.
    """

    confidence: float
    simultaneous_confidence: float
    reward_range: tuple[float, float]
    n: int
    users: int | None
    logging: EstimatorResult
    decide_by: str
    policies: dict[str, PolicyEvaluation]
    comparisons: tuple[Comparison, ...] = field(default_factory=tuple)
    propensities_estimated: bool = False
    unsupported: tuple[str, ...] = ()
    """Policies that are left out: no row of the log shows what they would show."""
    logging_rewards: dict[str, EstimatorResult] = field(default_factory=dict)
    """By named reward, the logging policy's mean."""
    looks: Looks | None = None
    """Earlier looks at the log, where it has a ledger."""
    time: TimeResult | None = None
    """Values over time; None where rows have no times."""

    @property
    def exit_code(self) -> int:
        """That of the best verdict (`gate.EXIT_CODES`)."""
        return best_exit_code([policy.verdict for policy in self.policies.values()])

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "users": self.users,
            "confidence": self.confidence,
            "simultaneous_confidence": self.simultaneous_confidence,
            "reward_range": list(self.reward_range),
            "propensities_estimated": self.propensities_estimated,
            "unsupported": list(self.unsupported),
            "decide_by": self.decide_by,
            "logging": self.logging.to_dict(),
            **_named(self.logging_rewards, "logging_rewards"),
            "policies": {name: policy.to_dict() for name, policy in self.policies.items()},
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            **({} if self.looks is None else {"looks": self.looks.to_dict()}),
            **({} if self.time is None else {"time": self.time.to_dict()}),
            "exit_code": self.exit_code,
        }


def _named(rewards: dict[str, EstimatorResult], key: str) -> dict[str, Any]:
    """The key only where there are named rewards."""
    return {key: {name: one.to_dict() for name, one in rewards.items()}} if rewards else {}


def _dict(value: Any) -> dict[str, Any] | None:
    return None if value is None else value.to_dict()
