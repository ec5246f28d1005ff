"""Distances between the distributions of two logs, with the error of their samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.data.profile import POINTS, ColumnProfile, LogProfile

Array = NDArray[np.float64]

_BINS = 10
"""Quantile bins of the population stability index of a number."""


@dataclass(frozen=True)
class ColumnDrift:
    """How far a column's distribution is from that of the reference.

    Attributes:
        distance: Kolmogorov-Smirnov of numbers, total variation over hash classes of categories,
            which is at most that over their values.
        low: bound on the distance of the two sources, with the stated error.
        stability_index: sum (p - q) log(p / q) over deciles of the reference or classes; 0.1 and
            0.25 are usual limits.
        change: what differs most, in words.
    """

    name: str
    distance: float
    low: float
    stability_index: float
    change: str


def compare_profiles(reference: LogProfile, served: LogProfile, delta: float) -> list[ColumnDrift]:
    """Distances of all columns that both have; all bounds are right with probability 1 - delta.

    Units must be independent within each log. By Dvoretzky, Kiefer, Wolfowitz and Massart (1990) an
    empirical distribution function of n units is off by more than sqrt(log(2 / d) / 2n) with
    probability at most d; the total variation of K classes is off by more than
    sqrt((K - 1) / n) / 2 + sqrt(log(1 / d) / 2n) (McDiarmid 1989). Half of a column's share of
    delta is for each log.
    """
    names = [name for name in reference.columns if name in served.columns]
    share = delta / max(1, 2 * len(names))
    units = (reference.units, served.units)
    found = []
    for name in names:
        before, now = reference.columns[name], served.columns[name]
        if before.quantiles is not None and now.quantiles is not None:
            distance, index, change = _numbers(before.quantiles, now.quantiles)
            slack = sum(_function_error(n, share) for n in units)
        elif before.buckets is not None and now.buckets is not None:
            distance, index, change = _categories(before, now)
            classes = before.buckets.size
            slack = sum(_class_error(n, classes, share) for n in units)
        else:
            distance, slack, index = 1.0, 0.0, math.inf
            change = "numbers in one log and categories in the other"
        found.append(ColumnDrift(name, distance, max(0.0, distance - slack), index, change))
    return found


def _function_error(n: int, share: float) -> float:
    """Of a distribution function from the quantiles of n units."""
    rounding = 1.0 / POINTS if n > POINTS else 0.0
    return math.sqrt(math.log(2.0 / share) / (2.0 * n)) + rounding


def _class_error(n: int, classes: int, share: float) -> float:
    """Of the total variation between the shares of n units and their source's."""
    return 0.5 * math.sqrt((classes - 1) / n) + math.sqrt(math.log(1.0 / share) / (2.0 * n))


def _numbers(before: NDArray[np.float32], now: NDArray[np.float32]) -> tuple[float, float, str]:
    at = np.union1d(before, now)
    gap = _share_up_to(before, at) - _share_up_to(now, at)
    edges = np.unique(np.quantile(before, np.arange(1, _BINS) / _BINS, method="lower"))
    shares = [np.diff(_share_up_to(one, edges), prepend=0.0, append=1.0) for one in (before, now)]
    medians = f"median {np.median(before):.4g}, now {np.median(now):.4g}"
    return float(np.abs(gap).max()), _stability(shares[0], shares[1], now.size), medians


def _categories(before: ColumnProfile, now: ColumnProfile) -> tuple[float, float, str]:
    assert before.buckets is not None and now.buckets is not None, "callers check"
    p, q = (counts / counts.sum() for counts in (before.buckets, now.buckets))
    index = _stability(p, q, int(now.buckets.sum()))
    gap = 0.5 * float(np.abs(p - q).sum())
    return gap, index, _largest_change(before.common, now.common)


def _largest_change(before: Mapping[str, float], now: Mapping[str, float]) -> str:
    """The value whose share changed most; 0 for one that is not among the most frequent."""
    names = sorted({*before, *now})
    if not names:
        return "no values"
    name = max(names, key=lambda one: abs(now.get(one, 0.0) - before.get(one, 0.0)))
    return f"'{name}' {before.get(name, 0.0):.1%}, now {now.get(name, 0.0):.1%}"


def _share_up_to(values: NDArray[np.float32], at: NDArray[np.float32]) -> Array:
    return np.searchsorted(values, at, side="right") / values.size


def _stability(p: Array, q: Array, n: int) -> float:
    """Population stability index; half a unit in each class, so that empty ones are finite."""
    p, q = (np.asarray((one + 0.5 / n) / (1.0 + 0.5 * one.size / n)) for one in (p, q))
    return float(((q - p) * np.log(q / p)).sum())
