"""Off-policy learning objectives: per-row terms in, a loss out."""

from offtower.objectives.base import LoggedRows, Objective, ObjectiveValue, Reduction
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
from offtower.objectives.registry import OBJECTIVES, make_objective
from offtower.objectives.regression import Regression
from offtower.objectives.regularised import Regularised
from offtower.objectives.smoothing import ExponentialSmoothing
from offtower.objectives.softmax import InBatchSoftmax, MixedNegatives, Softmax
from offtower.objectives.top_k import TopKCorrectedIPS
from offtower.objectives.weighted_likelihood import (
    BehaviorCloning,
    ExponentialLikelihood,
    WeightedLikelihood,
)

__all__ = [
    "IPS",
    "OBJECTIVES",
    "SNIPS",
    "BaselineIPS",
    "BehaviorCloning",
    "ClippedDoublyRobust",
    "ClippedIPS",
    "DoublyRobust",
    "ExponentialLikelihood",
    "ExponentialSmoothing",
    "ImplicitSquares",
    "InBatchSoftmax",
    "LogSmoothing",
    "LoggedRows",
    "MixedNegatives",
    "Objective",
    "ObjectiveValue",
    "OptimisticShrinkageDR",
    "PessimisticDR",
    "PessimisticIPS",
    "Potec",
    "Reduction",
    "Regression",
    "Regularised",
    "Softmax",
    "TopKCorrectedIPS",
    "WeightedLikelihood",
    "make_objective",
]
