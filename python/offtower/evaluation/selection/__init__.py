"""Estimator selection: choose the off-policy estimator for one log and one policy."""

from offtower.evaluation.rows import ModelPredictions
from offtower.evaluation.selection.candidates import default_candidates
from offtower.evaluation.selection.log import (
    BehaviorDraws,
    BehaviorPolicies,
    DensePolicies,
    SelectionLog,
)
from offtower.evaluation.selection.network import NetworkFit, NetworkOptions, fit_network
from offtower.evaluation.selection.problem import Candidate, Problem
from offtower.evaluation.selection.pseudo import PseudoProblem, pseudo_problem
from offtower.evaluation.selection.result import (
    CandidateScore,
    SelectionComparison,
    SelectionResult,
)
from offtower.evaluation.selection.select import METHODS, compare_selectors, select_estimator
from offtower.evaluation.selection.splits import (
    fit_split,
    fit_split_draws,
    fit_split_pooled,
    pseudo_weight,
)

__all__ = [
    "METHODS",
    "BehaviorDraws",
    "BehaviorPolicies",
    "Candidate",
    "CandidateScore",
    "DensePolicies",
    "ModelPredictions",
    "NetworkFit",
    "NetworkOptions",
    "Problem",
    "PseudoProblem",
    "SelectionComparison",
    "SelectionLog",
    "SelectionResult",
    "compare_selectors",
    "default_candidates",
    "fit_network",
    "fit_split",
    "fit_split_draws",
    "fit_split_pooled",
    "pseudo_problem",
    "pseudo_weight",
    "select_estimator",
]
