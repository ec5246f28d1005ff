"""Off-policy learning objectives: per-row terms in, a loss out."""

from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction
from offtower.objectives.doubly_robust import ClippedDoublyRobust, DoublyRobust
from offtower.objectives.ips import IPS, SNIPS, ClippedIPS
from offtower.objectives.log_smoothing import LogSmoothing
from offtower.objectives.registry import OBJECTIVES, make_objective
from offtower.objectives.regression import Regression
from offtower.objectives.softmax import InBatchSoftmax, MixedNegatives, Softmax
from offtower.objectives.weighted_likelihood import WeightedLikelihood

__all__ = [
    "IPS",
    "OBJECTIVES",
    "SNIPS",
    "ClippedDoublyRobust",
    "ClippedIPS",
    "DoublyRobust",
    "InBatchSoftmax",
    "LogSmoothing",
    "LoggedRows",
    "MixedNegatives",
    "Objective",
    "ObjectiveValue",
    "Reduction",
    "Regression",
    "Softmax",
    "WeightedLikelihood",
    "make_objective",
]
