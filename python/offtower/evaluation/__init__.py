"""Off-policy evaluation: estimators, intervals, diagnostics and the gate."""

from __future__ import annotations

from offtower.config import GateOptions
from offtower.evaluation import estimators
from offtower.evaluation.decision.gate import EXIT_CODES, Verdict
from offtower.evaluation.decision.pscore_calibration import pscore_calibration
from offtower.evaluation.decision.support import support_probe
from offtower.evaluation.evaluate import evaluate_rows
from offtower.evaluation.intervals.methods import Interval
from offtower.evaluation.intervals.statistics import Estimate, Statistics
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.propensities import estimate_propensities
from offtower.evaluation.sums import EvaluationSums

__all__ = [
    "EXIT_CODES",
    "Estimate",
    "EvaluationOptions",
    "EvaluationResult",
    "EvaluationRows",
    "EvaluationSums",
    "GateOptions",
    "Interval",
    "Statistics",
    "Verdict",
    "estimate_propensities",
    "estimators",
    "evaluate_rows",
    "pscore_calibration",
    "support_probe",
]
