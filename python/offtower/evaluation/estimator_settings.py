"""From the section `evaluation` of a configuration to estimators and options."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from offtower.config import EstimatorConfig, EvaluationConfig
from offtower.errors import ConfigError
from offtower.evaluation.estimators import (
    ESTIMATORS,
    Estimator,
    make_estimator,
    slope_choice,
)
from offtower.evaluation.estimators.tuning import default_values, parameter
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.rows import EvaluationRows

PARAMETERS = ("max_weight", "threshold", "shrinkage", "lambda_")
SLOPE = "slope"


def wanted_estimators(
    config: EvaluationConfig, has_reward_model: bool, notes: list[str]
) -> list[EstimatorConfig]:
    """The estimators that can be had; one without its reward model is left out, with a note.

    Raises ConfigError for an unknown name, a parameter that the estimator has not or lacks, or if
    none is left.
    """
    kept, left_out = [], []
    for one in config.estimators:
        given = _given(one)
        if SLOPE in given.values():
            _check_slope(one)
        else:
            make_estimator(one.name, **given)
        if one.name == "mips" and config.clusters is None:
            raise ConfigError(
                "the estimator mips needs evaluation.clusters: a category of the catalogue, or a "
                "number of clusters"
            )
        if ESTIMATORS[one.name].needs_reward_model and not has_reward_model:
            left_out.append(one.name)
        else:
            kept.append(one)
    if left_out:
        notes.append(
            f"{', '.join(left_out)} left out: the configuration names no reward model "
            "(reward_model.kind or evaluation.reward_model.kind)"
        )
    if not kept:
        raise ConfigError(
            "every estimator of evaluation.estimators needs a reward model, and the configuration "
            "names none"
        )
    return kept


def tuned(wanted: list[EstimatorConfig]) -> bool:
    """Whether some parameter is left to SLOPE."""
    return any(SLOPE in _given(one).values() for one in wanted)


def make_estimators(
    wanted: list[EstimatorConfig], pilot: Mapping[str, EvaluationRows], notes: list[str]
) -> tuple[Estimator, ...]:
    """The estimators, a parameter "slope" chosen on the pilot rows of all policies.

    Several policies share the least biased of their choices, since they are to be compared.
    """
    made = []
    for one in wanted:
        given = _given(one)
        if SLOPE not in given.values():
            made.append(make_estimator(one.name, **given))
            continue
        estimator = _slope(one, pilot)
        n = next(iter(pilot.values())).n
        notes.append(f"{estimator.name}: parameter chosen by SLOPE on {n:,} rows")
        made.append(estimator)
    return tuple(made)


def evaluation_options(
    config: EvaluationConfig,
    estimators: tuple[Estimator, ...],
    reward_range: tuple[float, float],
    seed: int,
    propensities_estimated: bool,
) -> EvaluationOptions:
    """How to judge, as the configuration says."""
    return EvaluationOptions(
        estimators=estimators,
        reward_range=reward_range,
        confidence=config.confidence,
        intervals=tuple(dict.fromkeys((config.interval, "normal", "bootstrap"))),
        decide_by=config.decide_by,
        by_user=config.by_user,
        replicates=config.replicates,
        seed=seed,
        max_weight=config.max_weight,
        gate=config.gate,
        propensities_estimated=propensities_estimated,
    )


def _given(one: EstimatorConfig) -> dict[str, float | str]:
    values = {name: getattr(one, name) for name in PARAMETERS}
    return {name: value for name, value in values.items() if value is not None}


def _check_slope(one: EstimatorConfig) -> None:
    if one.name not in ESTIMATORS:
        make_estimator(one.name)
    kind = ESTIMATORS[one.name]
    if list(_given(one)) != list(kind.parameters()):
        expected = ", ".join(kind.parameters()) or "no parameters"
        raise ConfigError(f"{one.name} takes {expected}; given: {', '.join(_given(one))}")


def _slope(one: EstimatorConfig, pilot: Mapping[str, EvaluationRows]) -> Estimator:
    kind = ESTIMATORS[one.name]
    name = parameter(kind)
    grids = [default_values(kind, rows) for rows in pilot.values()]
    values = sorted({float(v) for v in np.concatenate(grids)}, reverse=name != "lambda_")
    ladder = [kind(**{name: value}) for value in values]
    chosen = min(slope_choice([step.estimate(rows) for step in ladder]) for rows in pilot.values())
    return ladder[chosen]
