"""Off-policy learning objectives."""

from offtower.objectives.base import (
    ItemScores,
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    Requirements,
    SlateRows,
)
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
from offtower.objectives.registry import OBJECTIVES, make_objective
from offtower.objectives.regression import Regression
from offtower.objectives.regularized import Regularized
from offtower.objectives.slates import SlateObjective

__all__ = [
    "IPS",
    "OBJECTIVES",
    "SNIPS",
    "BehaviorCloning",
    "ClippedDoublyRobust",
    "ClippedIPS",
    "DoublyRobust",
    "ImplicitSquares",
    "InBatchSoftmax",
    "ItemScores",
    "LoggedRows",
    "MixedNegatives",
    "Objective",
    "ObjectiveValue",
    "Potec",
    "Reduction",
    "Regression",
    "Regularized",
    "Requirements",
    "SlateObjective",
    "SlateRows",
    "Softmax",
    "WeightedLikelihood",
    "make_objective",
]
