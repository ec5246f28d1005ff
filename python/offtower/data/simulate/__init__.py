"""Logs whose truth is known: a scalable factored world, and OBP's synthetic bandit feedback."""

from __future__ import annotations

from offtower.data.simulate.drawing import write_simulated_log
from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.obp_world import ObpWorld, obp_synthetic, true_value
from offtower.data.simulate.several import log_of_several, propensity_column
from offtower.data.simulate.world import FixedItemValue, PolicyValue, SimulatedWorld

__all__ = [
    "FixedItemValue",
    "LoggingPolicy",
    "ObpWorld",
    "PolicyValue",
    "SimulatedWorld",
    "log_of_several",
    "obp_synthetic",
    "propensity_column",
    "true_value",
    "write_simulated_log",
]
