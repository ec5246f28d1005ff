"""SLOPE: choose the most biased setting that no less biased one contradicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.estimators.base import Estimator
from offtower.evaluation.intervals.statistics import Estimate
from offtower.evaluation.rows import Array, EvaluationRows


@dataclass(frozen=True)
class Tuning:
    """A ladder of settings from least to most bias, and the one chosen."""

    chosen: int
    ladder: tuple[Estimator, ...]
    estimates: tuple[Estimate, ...]

    @property
    def estimator(self) -> Estimator:
        """The setting to use."""
        return self.ladder[self.chosen]

    def to_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.estimator.name,
            "ladder": [
                {"estimator": e.name, **estimate.to_dict()}
                for e, estimate in zip(self.ladder, self.estimates, strict=True)
            ],
        }


def slope_choice(estimates: Sequence[Estimate], width: float = 2.0) -> int:
    """Last i with |V_i - V_j| <= c_i + (sqrt(6) - 1) c_j for all j < i, c = width * std_error.

    SLOPE of Su, Srinath and Krishnamurthy (ICML 2020) in the form of Tucker and Lee (2021). The
    estimates go from least bias (and most variance) to most bias; they may come from merged
    statistics of shards.
    """
    if not estimates:
        raise OfftowerError("SLOPE needs at least one estimate")
    value = np.array([e.value for e in estimates])
    half = width * np.array([e.std_error for e in estimates])
    slack = np.sqrt(6.0) - 1.0
    chosen = 0
    for i in range(1, value.size):
        if not np.all(np.abs(value[i] - value[:i]) <= half[i] + slack * half[:i]):
            break
        chosen = i
    return chosen


def tune(
    estimator: type[Estimator],
    rows: EvaluationRows,
    values: Sequence[float] | None = None,
    width: float = 2.0,
) -> Tuning:
    """Choose the parameter of an estimator class by SLOPE.

    values: settings in any order; `default_values` by default.
    Raises OfftowerError for a class without a parameter.
    """
    ladder = _ladder(estimator, default_values(estimator, rows) if values is None else values)
    estimates = tuple(step.estimate(rows) for step in ladder)
    return Tuning(slope_choice(estimates, width), ladder, estimates)


def tune_together(estimator: type[Estimator], rows: Sequence[EvaluationRows]) -> Estimator:
    """One setting for several policies that are compared: the least biased of their choices."""
    ladder = _ladder(estimator, np.concatenate([default_values(estimator, one) for one in rows]))
    return ladder[min(slope_choice([step.estimate(one) for step in ladder]) for one in rows)]


def _ladder(estimator: type[Estimator], values: Iterable[float]) -> tuple[Estimator, ...]:
    """Settings from least to most bias: a falling threshold or shrinkage, rising smoothing."""
    name = parameter(estimator)
    ordered = sorted({float(v) for v in values}, reverse=name != "lambda_")
    return tuple(estimator(**{name: value}) for value in ordered)


def parameter(estimator: type[Estimator]) -> str:
    """Name of the class's parameter. Raises OfftowerError where it has none."""
    names = estimator.parameters()
    if len(names) != 1:
        raise OfftowerError(f"{estimator.label} has no parameter to tune")
    return names[0]


def default_values(estimator: type[Estimator], rows: EvaluationRows) -> Array:
    """A grid of settings, spread over what these weights make of them.

    Thresholds are quantiles of the weights, from the largest (no clipping) to the median.
    Shrinkage goes from 1e3 to 1e-3 of the largest weight squared, smoothing from 1e-4 to 1.
    """
    name = parameter(estimator)
    if name == "lambda_":
        return np.concatenate([[0.0, 1e-4], np.geomspace(1e-3, 1.0, 10)])
    weight = rows.importance_weight
    top = float(weight.max(initial=0.0))
    if top <= 0.0:
        return np.array([1.0])
    if name == "shrinkage":
        return top**2 * np.geomspace(1e3, 1e-3, 13)
    return threshold_grid(weight)


def threshold_grid(weight: Array) -> Array:
    """Thresholds from the largest weight (no clipping) down to the median, without repetition."""
    levels = np.quantile(weight, [1.0, 0.999, 0.995, 0.99, 0.97, 0.95, 0.9, 0.8, 0.65, 0.5])
    positive = levels[levels > 0.0]
    return np.unique(positive)[::-1] if positive.size else np.array([1.0])
