"""Logs whose truth is known: a scalable factored world, optionally with slates and eligible items,
and OBP's synthetic bandit feedback."""

from __future__ import annotations

from offtower.data.simulate.clicks import SlateSettings
from offtower.data.simulate.drift import DriftSettings, parse_drift
from offtower.data.simulate.eligible_sets import EligibilitySettings, parse_eligibility
from offtower.data.simulate.histories import HistorySettings
from offtower.data.simulate.log_files import write_simulated_log
from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.multi_policy import multi_policy_log, propensity_column
from offtower.data.simulate.obp_world import ObpWorld, obp_synthetic, true_value
from offtower.data.simulate.policy_values import FixedItemValue, PolicyValue
from offtower.data.simulate.served import ServedDistribution
from offtower.data.simulate.slate_values import (
    SlateValue,
    fixed_slate_value,
    logging_value,
    logging_value_of_week,
    slate_value,
)
from offtower.data.simulate.world import SimulatedWorld
from offtower.data.simulate.world_settings import WorldSettings

__all__ = [
    "DriftSettings",
    "EligibilitySettings",
    "FixedItemValue",
    "HistorySettings",
    "LoggingPolicy",
    "ObpWorld",
    "PolicyValue",
    "ServedDistribution",
    "SimulatedWorld",
    "SlateSettings",
    "SlateValue",
    "WorldSettings",
    "fixed_slate_value",
    "logging_value",
    "logging_value_of_week",
    "multi_policy_log",
    "obp_synthetic",
    "parse_drift",
    "parse_eligibility",
    "propensity_column",
    "slate_value",
    "true_value",
    "write_simulated_log",
]
