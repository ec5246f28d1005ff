"""Test logged propensities: inverse propensity mass of groups of items."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from offtower.errors import DataError
from offtower.evaluation.estimators import IPS
from offtower.evaluation.intervals.methods import bernstein_interval, check_confidence
from offtower.evaluation.intervals.smoothing_bound import SmoothingSums
from offtower.evaluation.rows import Array, EvaluationRows

_GROUPS = 20


@dataclass(frozen=True)
class PscoreGroup:
    """A group of items: E[1{a in group} / pscore] is its number of items, so its mass is 1.

    mass: mean of 1{a in group} / pscore over the group's number of items.
    low, high: bounds of its expectation; high is None where no least pscore is known, since the
    rows that would make up a missing mass may not have been seen.
    """

    group: int
    items: int
    n: int
    mass: float
    low: float
    high: float | None

    @property
    def ok(self) -> bool:
        """Whether 1 lies within the bounds."""
        return self.low <= 1.0 and (self.high is None or self.high >= 1.0)


@dataclass(frozen=True)
class PscoreCalibration:
    """Inverse propensity mass of groups of items; all bounds hold at once with `confidence`."""

    groups: tuple[PscoreGroup, ...]
    confidence: float

    @property
    def ok(self) -> bool:
        """No group's mass is wrong beyond chance."""
        return all(group.ok for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        return {
            "groups": [{**asdict(group), "ok": group.ok} for group in self.groups],
            "confidence": self.confidence,
            "ok": self.ok,
        }


def pscore_calibration(
    pscore: ArrayLike,
    action: ArrayLike,
    num_items: int,
    group: ArrayLike | None = None,
    *,
    least_pscore: float | None = None,
    confidence: float = 0.99,
) -> PscoreCalibration:
    """Test whether every group of items carries the inverse propensity mass that it should.

    For true propensities with full support, E[1{a in G} / pscore] = |G| for every set G of items
    that is chosen without looking at the log. The bounds hold for every number of rows and every
    tail: below by logarithmic smoothing (`smoothing_bound`), above by empirical Bernstein, which
    needs the least pscore that the logging policy can give (its exploration floor). A z-test of the
    mean would raise false alarms, since 1 / pscore is heavily skewed.

    pscore, action: (n,) logged. group: (num_items,) a code from 0 for each item; by default 20
    blocks of consecutive items.
    Raises DataError for a pscore outside (0, 1] or below least_pscore, or an action outside
    [0, num_items).
    """
    p, a = np.asarray(pscore, dtype=np.float64), np.asarray(action)
    if p.ndim != 1 or p.shape != a.shape or p.size < 2:
        raise DataError(f"pscore and action must be two lists of one length: {p.shape}, {a.shape}")
    if not ((p > 0.0) & (p <= 1.0)).all():
        raise DataError("pscore must lie in (0, 1]")
    if least_pscore is not None and p.min() < least_pscore:
        raise DataError(f"a pscore of {p.min():g} is below least_pscore={least_pscore:g}")
    if a.dtype.kind not in "iu" or a.min() < 0 or a.max() >= num_items:
        raise DataError(f"actions must be integers in [0, {num_items})")
    if group is None:
        codes = np.arange(num_items) * min(_GROUPS, num_items) // num_items
    else:
        codes = np.asarray(group, dtype=np.int64)
        if codes.shape != (num_items,) or codes.min() < 0:
            raise DataError(f"group must be {num_items} codes that are not negative")
    logged, size = codes[a], np.bincount(codes)
    present = np.flatnonzero(size)
    share = (1.0 - check_confidence(confidence)) / present.size
    groups = tuple(
        _group(int(g), int(size[g]), np.where(logged == g, 1.0 / p, 0.0), share, least_pscore)
        for g in present
    )
    return PscoreCalibration(groups, confidence)


def _group(
    code: int, items: int, inverse: Array, delta: float, least_pscore: float | None
) -> PscoreGroup:
    rows = EvaluationRows(inverse / items, np.zeros_like(inverse))
    tail = delta if least_pscore is None else delta / 2
    low = SmoothingSums.of(rows, (0.0, 1.0)).mean_weight(tail)
    high = None
    if least_pscore is not None:
        mass = IPS()  # a mean of weights: rewards of 1
        ones = EvaluationRows(rows.importance_weight, np.ones_like(inverse))
        bounds = (0.0, 1.0 / (least_pscore * items))
        # The interval gives each side half of what its confidence leaves.
        high = bernstein_interval(mass, mass.statistics(ones), bounds, 1.0 - 2.0 * tail).high
    count = int(np.count_nonzero(inverse))
    return PscoreGroup(code, items, count, float(rows.importance_weight.mean()), low, high)
