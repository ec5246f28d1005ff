"""Propensities: do the logged ones hold together, and what to do where a log has none."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from offtower.errors import DataError, OfftowerError
from offtower.evaluation.estimators import IPS
from offtower.evaluation.intervals.methods import bernstein_interval, check_confidence
from offtower.evaluation.intervals.smoothing_bound import SmoothingSums
from offtower.evaluation.rows import Array, EvaluationRows, IntArray

MAX_ITEMS = 5000
"""Largest catalogue for which a dense model of the logging policy is fitted."""
_GROUPS = 20
_FLOOR = 1e-12


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
    """Does every group of items carry the inverse propensity mass that it should?

    For true propensities with full support, E[1{a in G} / pscore] = |G| for every set G of items
    that is chosen without looking at the log. The bounds hold for every number of rows and every
    tail: below by logarithmic smoothing (`smoothing_bound`), above by empirical Bernstein, which
    needs the least pscore that the logging policy can give (its exploration floor). Means and
    standard errors are no guide here: 1 / pscore is so skewed that they raise false alarms.

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


@dataclass(frozen=True)
class EstimatedPropensities:
    """Estimates in place of logged propensities: no interval covers their error.

    Attributes:
        pscore: (n,) estimated probability of the logged action, from a model that did not see the
            row (nor its user).
        temperature: by which the model's logits were divided; far from 1 it was over- or
            underconfident.
        log_loss, marginal_log_loss: of the logged actions, held out; of the actions' frequencies.
        mean_inverse: mean of 1 / pscore over the number of items: 1 in expectation if true.
    """

    pscore: Array
    temperature: float
    log_loss: float
    marginal_log_loss: float
    mean_inverse: float

    def to_dict(self) -> dict[str, Any]:
        """All but the array, with the warning that belongs to it."""
        return {
            "estimated": True,
            "warning": "propensities are estimates, not logged: every off-policy value rests on "
            "them, and no interval covers their error",
            "temperature": self.temperature,
            "log_loss": self.log_loss,
            "marginal_log_loss": self.marginal_log_loss,
            "mean_inverse": self.mean_inverse,
        }


def estimate_propensities(
    context: ArrayLike,
    action: ArrayLike,
    num_items: int,
    *,
    user: ArrayLike | None = None,
    folds: int = 5,
    seed: int = 0,
) -> EstimatedPropensities:
    """Estimate pi_0(a|x) of a log that has no pscore.

    Multinomial logistic regression, cross-fitted in folds (of users where given), its logits
    divided by a temperature fitted on the held-out rows (Guo, Pleiss, Sun, Weinberger, ICML 2017).
    An action that a fold's training part lacks gets a smoothed frequency.

    context: (n, p) numbers. action: (n,) in [0, num_items). At most 5,000 items.
    Raises OfftowerError for a larger catalogue, DataError for malformed arrays.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, a = np.asarray(context, dtype=np.float64), np.asarray(action)
    if num_items > MAX_ITEMS:
        raise OfftowerError(
            f"propensities of {num_items:,} items cannot be estimated by a dense model (at most "
            f"{MAX_ITEMS:,}); log them, or train a policy on the log by weighted_likelihood "
            "without weights and use its probabilities"
        )
    if x.ndim != 2 or x.shape[0] != a.size or not np.isfinite(x).all():
        raise DataError(f"context must be ({a.size}, p) finite numbers, but has shape {x.shape}")
    if a.dtype.kind not in "iu" or a.size < 2 * folds or a.min() < 0 or a.max() >= num_items:
        raise DataError(
            f"actions must be at least {2 * folds} integers in [0, {num_items}) for {folds} folds"
        )
    fold = _folds(np.arange(a.size) if user is None else np.asarray(user), folds, seed)
    logits = np.empty((a.size, num_items))
    marginal = np.empty(a.size)
    for k in range(folds):
        held, kept = fold == k, fold != k
        if not held.any():
            continue
        seen = np.unique(a[kept])
        frequency = (np.bincount(a[kept], minlength=num_items) + 1.0) / (kept.sum() + num_items)
        marginal[held] = frequency[a[held]]
        if seen.size < 2:
            logits[held] = np.log(frequency)
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        model.fit(x[kept], a[kept])
        # Unseen actions share their smoothed frequency, the seen ones the rest.
        part = np.tile(np.log(frequency), (int(held.sum()), 1))
        rest = np.log(frequency[seen].sum())
        part[:, seen] = np.log(np.maximum(model.predict_proba(x[held]), _FLOOR)) + rest
        logits[held] = part

    def loss(log_temperature: float) -> float:
        return -float(_log_prob(logits, a, np.exp(log_temperature)).mean())

    temperature = float(np.exp(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded").x))
    log_prob = _log_prob(logits, a, temperature)
    pscore = np.exp(log_prob)
    return EstimatedPropensities(
        pscore,
        temperature,
        -float(log_prob.mean()),
        -float(np.log(marginal).mean()),
        float(np.mean(1.0 / pscore)) / num_items,
    )


def _log_prob(logits: Array, action: IntArray, temperature: float) -> Array:
    scaled = logits / temperature
    picked = scaled[np.arange(action.size), action]
    return np.asarray(picked - logsumexp(scaled, axis=1), dtype=np.float64)


def _folds(key: NDArray[Any], folds: int, seed: int) -> IntArray:
    """A fold for each row, the same for rows of the same key; sizes (in keys) differ by one."""
    unique, where = np.unique(key, return_inverse=True)
    order = np.random.default_rng(seed).permutation(unique.size)
    return np.asarray((order % folds)[where], dtype=np.int64)
