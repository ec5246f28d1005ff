"""Objectives by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from offtower.errors import ConfigError
from offtower.imports import load_class
from offtower.objectives.base import Objective
from offtower.objectives.doubly_robust import ClippedDoublyRobust, DoublyRobust
from offtower.objectives.implicit_squares import ImplicitSquares
from offtower.objectives.ips import IPS, SNIPS, ClippedIPS
from offtower.objectives.likelihood import (
    BehaviorCloning,
    InBatchSoftmax,
    MixedNegatives,
    Softmax,
    WeightedLikelihood,
)
from offtower.objectives.potec import Potec
from offtower.objectives.regression import Regression
from offtower.objectives.top_k import TopKCorrectedIPS

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (
        IPS,
        ClippedIPS,
        SNIPS,
        TopKCorrectedIPS,
        DoublyRobust,
        ClippedDoublyRobust,
        Potec,
        Regression,
        WeightedLikelihood,
        BehaviorCloning,
        ImplicitSquares,
        Softmax,
        InBatchSoftmax,
        MixedNegatives,
    )
}


def make_objective(name: str, arguments: Mapping[str, Any] | None = None) -> Objective:
    """Build the objective called `name`, or a user's class by import path "package.module:Class".

    Raises:
        ConfigError: unknown name (with the nearest known one) or unknown settings.
    """
    if ":" in name:
        kind: type[Objective] = load_class(
            name, "objective.name", Objective, "offtower.objectives.Objective"
        )
    elif name in OBJECTIVES:
        kind = OBJECTIVES[name]
    else:
        known = ["auto", *OBJECTIVES]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise ConfigError(f"unknown objective '{name}'.{hint} Known: {', '.join(known)}")
    try:
        return kind(**(arguments or {}))
    except TypeError as error:
        raise ConfigError(f"objective '{name}' does not take these settings: {error}") from error
