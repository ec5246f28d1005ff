"""A/B tests of a policy: planned from its offline evaluation, read at any time while they run."""

from offtower.experiment.assignment import Assignment
from offtower.experiment.bets import Bets
from offtower.experiment.martingale import DifferenceMartingale
from offtower.experiment.plan import (
    ExperimentDesign,
    ExperimentPlan,
    OfflineEvidence,
    plan_experiment,
)
from offtower.experiment.read import Reading, read_experiment

__all__ = [
    "Assignment",
    "Bets",
    "DifferenceMartingale",
    "ExperimentDesign",
    "ExperimentPlan",
    "OfflineEvidence",
    "Reading",
    "plan_experiment",
    "read_experiment",
]
