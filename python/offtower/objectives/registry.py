"""Objectives by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from offtower.errors import ConfigError
from offtower.imports import load_class
from offtower.objectives.base import Objective
from offtower.objectives.baseline import BaselineIPS
from offtower.objectives.doubly_robust import (
    ClippedDoublyRobust,
    DoublyRobust,
    OptimisticShrinkageDR,
)
from offtower.objectives.implicit_squares import ImplicitSquares
from offtower.objectives.ips import IPS, SNIPS, ClippedIPS
from offtower.objectives.log_smoothing import LogSmoothing
from offtower.objectives.pessimistic import PessimisticDR, PessimisticIPS
from offtower.objectives.potec import Potec
from offtower.objectives.regression import Regression
from offtower.objectives.smoothing import ExponentialSmoothing
from offtower.objectives.softmax import InBatchSoftmax, MixedNegatives, Softmax
from offtower.objectives.top_k import TopKCorrectedIPS
from offtower.objectives.weighted_likelihood import (
    BehaviorCloning,
    ExponentialLikelihood,
    WeightedLikelihood,
)

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (
        IPS,
        ClippedIPS,
        SNIPS,
        BaselineIPS,
        ExponentialSmoothing,
        LogSmoothing,
        PessimisticIPS,
        TopKCorrectedIPS,
        DoublyRobust,
        ClippedDoublyRobust,
        OptimisticShrinkageDR,
        PessimisticDR,
        Potec,
        Regression,
        WeightedLikelihood,
        ExponentialLikelihood,
        BehaviorCloning,
        ImplicitSquares,
        Softmax,
        InBatchSoftmax,
        MixedNegatives,
    )
}


def make_objective(name: str, arguments: Mapping[str, Any] | None = None) -> Objective:
    """The objective called `name`, or a user's own by import path "package.module:Class".

    Raises:
        ConfigError: unknown name (with the nearest known one) or settings it does not take.
    """
    if ":" in name:
        kind = load_class(name, "objective.name", Objective, "offtower.objectives.Objective")
    elif name in OBJECTIVES:
        kind = OBJECTIVES[name]
    else:
        nearest = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise ConfigError(f"unknown objective '{name}'.{hint} Known: {', '.join(OBJECTIVES)}")
    try:
        return kind(**(arguments or {}))
    except TypeError as error:
        raise ConfigError(f"objective '{name}' does not take these settings: {error}") from error
