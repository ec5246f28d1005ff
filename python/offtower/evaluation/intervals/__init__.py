"""Mergeable sums over rows, and the confidence intervals that follow from them."""

from offtower.evaluation.intervals.gamma import gamma_interval
from offtower.evaluation.intervals.methods import (
    Interval,
    bernstein_interval,
    bootstrap_interval,
    normal_interval,
    simultaneous_confidence,
)

__all__ = [
    "Interval",
    "bernstein_interval",
    "bootstrap_interval",
    "gamma_interval",
    "normal_interval",
    "simultaneous_confidence",
]
