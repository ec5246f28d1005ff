"""Estimator selection: choose the off-policy estimator for one log and one policy."""

from offtower.evaluation.rows import ModelPredictions
from offtower.evaluation.selection.candidates import default_candidates
from offtower.evaluation.selection.log import (
    BehaviorDraws,
    BehaviorPolicies,
    DensePolicies,
    SelectionLog,
)
from offtower.evaluation.selection.network import NetworkOptions
from offtower.evaluation.selection.problem import Candidate, Problem
from offtower.evaluation.selection.result import (
    CandidateScore,
    SelectionComparison,
    SelectionResult,
)
from offtower.evaluation.selection.select import METHODS, compare_selectors, select_estimator

__all__ = [
    "METHODS",
    "BehaviorDraws",
    "BehaviorPolicies",
    "Candidate",
    "CandidateScore",
    "DensePolicies",
    "ModelPredictions",
    "NetworkOptions",
    "Problem",
    "SelectionComparison",
    "SelectionLog",
    "SelectionResult",
    "compare_selectors",
    "default_candidates",
    "select_estimator",
]
