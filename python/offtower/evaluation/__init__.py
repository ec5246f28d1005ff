"""Off-policy evaluation: estimators, intervals, diagnostics and the gate."""

from __future__ import annotations

from offtower.evaluation import estimators
from offtower.evaluation.intervals import Interval
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.statistics import Estimate, Statistics

__all__ = ["Estimate", "EvaluationRows", "Interval", "Statistics", "estimators"]
