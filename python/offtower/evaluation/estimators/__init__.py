"""Off-policy estimators of a policy's value."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from offtower.errors import OfftowerError
from offtower.evaluation.estimators.base import Estimator
from offtower.evaluation.estimators.loggers import (
    LoggerWeighted,
    LoggerWeightedDR,
    LoggerWeightedIPS,
    balanced_weight,
)
from offtower.evaluation.estimators.means import (
    DM,
    DR,
    IPS,
    MIPS,
    ClippedDR,
    ClippedIPS,
    DRos,
    LogSmoothing,
    SubGaussianDR,
    SubGaussianIPS,
    SwitchDR,
    cluster_weight,
)
from offtower.evaluation.estimators.paired import Difference, MeanReward
from offtower.evaluation.estimators.regression import RegDR, RegIPS
from offtower.evaluation.estimators.self_normalized import SNDR, SNIPS
from offtower.evaluation.estimators.slates import Standard
from offtower.evaluation.estimators.tuning import Tuning, slope_choice, tune
from offtower.evaluation.intervals.statistics import Estimate, Statistics

ESTIMATORS: dict[str, type[Estimator]] = {
    cls.label: cls
    for cls in (
        IPS,
        ClippedIPS,
        SNIPS,
        DM,
        DR,
        ClippedDR,
        SNDR,
        RegIPS,
        RegDR,
        LoggerWeightedIPS,
        LoggerWeightedDR,
        SwitchDR,
        DRos,
        SubGaussianIPS,
        SubGaussianDR,
        LogSmoothing,
        MIPS,
    )
}
"""By name in a configuration."""


def make_estimator(name: str, **parameters: Any) -> Estimator:
    """Make an estimator by its name in `ESTIMATORS`: make_estimator("clipped_ips", max_weight=9).

    Raises OfftowerError for an unknown name (with the nearest one) or wrong parameters.
    """
    if name not in ESTIMATORS:
        near = difflib.get_close_matches(name, ESTIMATORS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise OfftowerError(f"unknown estimator {name!r}{hint} Known: {', '.join(ESTIMATORS)}")
    try:
        return ESTIMATORS[name](**parameters)
    except TypeError:
        expected = ", ".join(ESTIMATORS[name].parameters()) or "no parameters"
        raise OfftowerError(
            f"{name} takes {expected}; given: {', '.join(parameters) or 'nothing'}"
        ) from None


def of_loggers(estimator: Estimator, loggers: int) -> Estimator:
    """The estimator for a log of so many behavior policies; most do not tell these apart."""
    return (
        replace(estimator, loggers=loggers) if isinstance(estimator, LoggerWeighted) else estimator
    )


__all__ = [
    "DM",
    "DR",
    "ESTIMATORS",
    "IPS",
    "MIPS",
    "SNDR",
    "SNIPS",
    "ClippedDR",
    "ClippedIPS",
    "DRos",
    "Difference",
    "Estimate",
    "Estimator",
    "LogSmoothing",
    "LoggerWeighted",
    "LoggerWeightedDR",
    "LoggerWeightedIPS",
    "MeanReward",
    "RegDR",
    "RegIPS",
    "Standard",
    "Statistics",
    "SubGaussianDR",
    "SubGaussianIPS",
    "SwitchDR",
    "Tuning",
    "balanced_weight",
    "cluster_weight",
    "make_estimator",
    "of_loggers",
    "slope_choice",
    "tune",
]
