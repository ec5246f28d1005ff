"""How to evaluate: estimators, intervals and gate, given directly or by a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from offtower.config import EstimatorConfig, EvaluationConfig, GateOptions, TimeOptions
from offtower.data.schema import PscoreKind
from offtower.errors import ConfigError, OfftowerError
from offtower.evaluation.behavior.loggers import Loggers
from offtower.evaluation.estimators import (
    ESTIMATORS,
    SNIPS,
    Estimator,
    RegIPS,
    Standard,
    make_estimator,
    of_loggers,
)
from offtower.evaluation.estimators.tuning import tune_together
from offtower.evaluation.intervals.methods import (
    DEFAULT_METHOD,
    check_confidence,
    simultaneous_confidence,
)
from offtower.evaluation.intervals.smoothing_bound import check_range
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.slate_options import check_interaction, has_form

PARAMETERS = ("max_weight", "threshold", "shrinkage", "lambda_")
SLOPE = "slope"
_DECIDERS = ("reg_dr", "dr", "reg_ips", "snips")
"""Estimators of a verdict in order of preference; the regression estimators are asked for."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate.

    Attributes:
        estimators: by which to estimate each policy's value.
        reward_range: least and largest possible reward.
        confidence: of every interval. The verdicts share it (Bonferroni over the policies).
        intervals: methods, of "gamma", "normal", "bootstrap" and "bernstein"; verdicts use the
            first. "auto" is the default method.
        decide_by: label or name of the estimator of the verdicts; "auto" is reg_dr, else dr,
            reg_ips, snips, else the first.
        by_user: clusters rows by their user; None does so where rows have users.
        replicates: of the bootstrap; None takes 500, or as many as the confidence needs.
        seed: of the bootstrap.
        max_weight: largest possible weight; "bernstein" needs it, "gamma" is narrower with it.
        gate: what a verdict requires.
        propensities_estimated: the log had no propensities; verdicts say so.
        reward_names: of the rows' named rewards, each evaluated beside their weighted sum.
        verdict_confidences: of each policy's verdict, in their order, where earlier looks at the
            log count (`evaluation.looks`); empty shares `confidence` among the policies.
        time: how values over time are estimated, where rows have times.
    """

    estimators: tuple[Estimator, ...]
    reward_range: tuple[float, float]
    confidence: float = 0.95
    intervals: tuple[str, ...] = ("auto", "normal", "bootstrap")
    decide_by: str = "auto"
    by_user: bool | None = None
    replicates: int | None = None
    seed: int = 0
    max_weight: float | None = None
    gate: GateOptions = field(default_factory=GateOptions)
    propensities_estimated: bool = False
    reward_names: tuple[str, ...] = ()
    verdict_confidences: tuple[float, ...] = ()
    time: TimeOptions = field(default_factory=TimeOptions)

    def __post_init__(self) -> None:
        check_range(self.reward_range)
        for confidence in (self.confidence, *self.verdict_confidences):
            check_confidence(confidence)
        names = [estimator.name for estimator in self.estimators]
        if not names or len(set(names)) != len(names):
            raise OfftowerError(f"estimators must be some, each once: {names}")
        chosen = [DEFAULT_METHOD if method == "auto" else method for method in self.intervals]
        object.__setattr__(self, "intervals", tuple(dict.fromkeys(chosen)))
        known = ("gamma", "normal", "bootstrap", "bernstein")
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
            return next((labels.index(x) for x in _DECIDERS if x in labels), 0)
        for i, estimator in enumerate(self.estimators):
            if self.decide_by in (estimator.label, estimator.name):
                return i
        raise OfftowerError(f"decide_by={self.decide_by!r} is none of {', '.join(labels)}")

    @property
    def named_estimator(self) -> Estimator:
        """Estimator of the named rewards: that of the verdicts, or SNIPS where it needs a reward
        model, which predicts their sum only."""
        chosen = self.estimators[self.decider]
        if not chosen.needs_reward_model:
            return chosen
        return RegIPS() if chosen.controls else SNIPS()

    def verdict_confidence(self, policy: int, policies: int) -> float:
        """Confidence of one policy's verdict, so that those of all hold at once."""
        if self.verdict_confidences:
            return self.verdict_confidences[policy]
        return simultaneous_confidence(self.confidence, policies)

    def joint_confidence(self, policies: int) -> float:
        """The largest confidence of a verdict."""
        return max(self.verdict_confidence(policy, policies) for policy in range(max(1, policies)))

    def bootstrap_replicates(self, policies: int) -> int:
        """Replicates to carry for intervals of all policies."""
        if "bootstrap" not in self.intervals:
            return 0
        if self.replicates is not None:
            return self.replicates
        level = self.confidence
        if self.intervals[0] == "bootstrap":
            level = self.joint_confidence(policies)
        return max(500, int(np.ceil(10.0 / (1.0 - level) - 1e-9)))


def evaluation_options(
    config: EvaluationConfig,
    estimators: tuple[Estimator, ...],
    reward_range: tuple[float, float],
    seed: int,
    *,
    propensities_estimated: bool,
    reward_names: tuple[str, ...] = (),
) -> EvaluationOptions:
    """Options as the configuration says."""
    return EvaluationOptions(
        estimators=estimators,
        reward_range=reward_range,
        confidence=config.confidence,
        intervals=(config.interval, "gamma", "normal", "bootstrap"),
        decide_by=config.decide_by,
        by_user=config.by_user,
        replicates=config.replicates,
        seed=seed,
        max_weight=config.max_weight,
        gate=config.gate,
        propensities_estimated=propensities_estimated,
        reward_names=reward_names,
        time=config.time,
    )


def usable_estimators(
    config: EvaluationConfig, *, has_reward_model: bool, pscore_kind: PscoreKind | None = None
) -> tuple[list[EstimatorConfig], list[str]]:
    """The configured estimators that can run, and a note on those without their reward model.

    pscore_kind: of a log of slates; None for other logs.
    Raises ConfigError for an unknown name, a missing or unknown parameter, or if none is left.
    """
    kept, left_out, formless = [], [], []
    for one in config.estimators:
        given = _parameters(one)
        if SLOPE in given.values():
            _check_slope(one)
        else:
            make_estimator(one.name, **given)
        if one.name == "mips" and config.clusters is None:
            raise ConfigError(
                "the estimator mips needs evaluation.clusters: a category of the catalogue, or a "
                "number of clusters"
            )
        check_interaction(one, pscore_kind)
        if not has_form(one, pscore_kind):
            formless.append(one.name)
        elif ESTIMATORS[one.name].needs_reward_model and not has_reward_model:
            left_out.append(one.name)
        else:
            kept.append(one)
    if not kept and formless:
        raise ConfigError(
            f"{', '.join(formless)}: no form for slates with {pscore_kind} pscores; add ips to "
            "evaluation.estimators"
        )
    if not kept:
        raise ConfigError(
            "every estimator of evaluation.estimators needs a reward model, and the run has none: "
            "set evaluation.reward_model.kind=factored"
        )
    notes = []
    if left_out:
        notes.append(
            f"{', '.join(left_out)} left out: the run has no reward model. To fit one for the "
            "evaluation, set evaluation.reward_model.kind=factored (any catalogue) or dense (a "
            "small one)"
        )
    if formless:
        notes.append(
            f"{', '.join(formless)} left out: no form for slates with {pscore_kind} pscores. With "
            "conditional pscores dr and clipped_dr use the reward model, position by position"
        )
    return kept, notes


def needs_pilot(estimators: Sequence[EstimatorConfig]) -> bool:
    """Whether SLOPE chooses some parameter."""
    return any(SLOPE in _parameters(one).values() for one in estimators)


def make_estimators(
    estimators: Sequence[EstimatorConfig],
    pilot: Mapping[str, EvaluationRows],
    loggers: Loggers | None = None,
) -> tuple[tuple[Estimator, ...], list[str]]:
    """The estimators, a parameter "slope" chosen on the pilot rows of all policies; and notes.

    loggers: the log's behavior policies, for estimators that tell them apart.
    """
    count = 1 if loggers is None else len(loggers.names.name)
    made, notes = [], []
    for one in estimators:
        given = _parameters(one)
        if SLOPE not in given.values():
            made.append(_interacting(one, of_loggers(make_estimator(one.name, **given), count)))
            continue
        rows = list(pilot.values())
        if _is_standard(one):
            rows = [rows_of_policy.standard() for rows_of_policy in rows]
        made.append(_interacting(one, tune_together(ESTIMATORS[one.name], rows)))
        notes.append(f"{made[-1].name}: parameter chosen by SLOPE on {rows[0].n:,} rows")
    return tuple(made), notes


def _is_standard(one: EstimatorConfig) -> bool:
    return one.interaction == "standard"


def _interacting(one: EstimatorConfig, estimator: Estimator) -> Estimator:
    return Standard(estimator) if _is_standard(one) else estimator


def _parameters(one: EstimatorConfig) -> dict[str, float | str]:
    values = {name: getattr(one, name) for name in PARAMETERS}
    return {name: value for name, value in values.items() if value is not None}


def _check_slope(one: EstimatorConfig) -> None:
    if one.name not in ESTIMATORS:
        make_estimator(one.name)
    kind = ESTIMATORS[one.name]
    if list(_parameters(one)) != list(kind.parameters()):
        expected = ", ".join(kind.parameters()) or "no parameters"
        raise ConfigError(f"{one.name} takes {expected}; given: {', '.join(_parameters(one))}")
