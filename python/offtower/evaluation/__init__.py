"""Off-policy evaluation: estimators, intervals, diagnostics and the gate."""

from __future__ import annotations

from offtower.evaluation import estimators
from offtower.evaluation.diagnostics import support_probe
from offtower.evaluation.evaluate import EvaluationSums, evaluate_rows
from offtower.evaluation.gate import EXIT_CODES, GateOptions, Verdict
from offtower.evaluation.intervals import Interval
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.propensity import estimate_propensities, pscore_calibration
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.statistics import Estimate, Statistics

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
