"""Estimated logging probabilities: of items in a log without propensities, and of clusters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp

from offtower.data.catalogue import Catalogue
from offtower.data.encoding import FeatureEncoding
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError, DataError, OfftowerError
from offtower.evaluation.rows import Array, IntArray
from offtower.models.reward.dense import flatten
from offtower.progress import Progress
from offtower.slates import conditional_log_prob, round_sum

MAX_ITEMS = 5000
"""Largest catalogue for which a dense model of the logging policy is fitted."""
MAX_ROWS = 2_000_000
"""Longest log from which propensities are estimated: its contexts are held in memory."""
_SCAN_ROWS = 8192
_FLOOR = 1e-12
_WORSE_Z = -4.0
"""Standard errors below the frequencies at which estimates are refused: of true frequencies, one
log in 30,000."""


@dataclass(frozen=True)
class EstimatedPropensities:
    """Estimates in place of logged propensities: no interval covers their error.

    Attributes:
        pscore: (n,) estimated probability of the logged action, from a model that did not see the
            row (nor its user).
        temperature: by which the model's logits were divided; far from 1 the model was over- or
            underconfident.
        log_loss, marginal_log_loss: of the logged actions, held out; of the actions' frequencies.
        gain_z: mean gain in log-probability over the frequencies, in its standard errors; clearly
            below 0 the model is worse than they are.
        mean_inverse: mean of 1 / pscore over the number of items: 1 in expectation if true.
    """

    pscore: Array
    temperature: float
    log_loss: float
    marginal_log_loss: float
    mean_inverse: float
    gain_z: float = 0.0

    @property
    def warning(self) -> str:
        """For every report of a value that rests on these."""
        return (
            "THE PROPENSITIES ARE ESTIMATES, NOT LOGGED: every off-policy value here rests on them "
            f"and no interval covers their error (held-out log loss {self.log_loss:.3g} against "
            f"{self.marginal_log_loss:.3g} for the items' frequencies; mean of 1 / propensity over "
            f"the number of items {self.mean_inverse:.3g}, 1 if true)"
        )

    def to_dict(self) -> dict[str, Any]:
        """All but the array, with the warning."""
        return {
            "estimated": True,
            "warning": self.warning,
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
    eligible: ArrayLike | None = None,
    fitted: ArrayLike | None = None,
    folds: int = 5,
    seed: int = 0,
) -> EstimatedPropensities:
    """Estimate pi_0(a|x) of a log that has no pscore.

    Multinomial logistic regression, cross-fitted in folds (of users where given), its logits
    divided by a temperature fitted on the held-out rows (Guo, Pleiss, Sun, Weinberger, ICML 2017).
    An action that a fold's training part lacks gets a smoothed frequency.

    context: (n, p) numbers. action: (n,) in [0, num_items). At most 5,000 items. eligible:
    (n, num_items) which items a row could show; the model is then a conditional logit (McFadden
    1974), whose softmax runs over the row's eligible items. fitted: (n,) bool, the rows that the
    model and its temperature learn from; all by default.
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
    allowed = None if eligible is None else np.asarray(eligible, dtype=bool)
    if allowed is not None and not (
        allowed.shape == (a.size, num_items) and allowed[np.arange(a.size), a].all()
    ):
        raise DataError(
            f"eligible must be ({a.size}, {num_items}) and hold every logged action, but has shape "
            f"{allowed.shape} or rules out an action"
        )
    learned = np.ones(a.size, dtype=bool) if fitted is None else np.asarray(fitted, dtype=bool)
    fold = _folds(np.arange(a.size) if user is None else np.asarray(user), folds, seed)
    logits = np.empty((a.size, num_items))
    marginal = np.empty(a.size)
    for k in range(folds):
        held, kept = fold == k, (fold != k) & learned
        if not held.any():
            continue
        seen = np.unique(a[kept])
        frequency = (np.bincount(a[kept], minlength=num_items) + 1.0) / (kept.sum() + num_items)
        marginal[held] = frequency[a[held]]
        if allowed is not None:
            marginal[held] /= allowed[held] @ frequency
        if seen.size < 2:
            logits[held] = np.log(frequency)
            continue
        if allowed is None:
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
            model.fit(x[kept], a[kept])
            probability = model.predict_proba(x[held])
        else:
            scaler = StandardScaler().fit(x[kept])
            probability = _conditional_logit(
                (scaler.transform(x[kept]), np.searchsorted(seen, a[kept]), allowed[kept][:, seen]),
                (scaler.transform(x[held]), allowed[held][:, seen]),
            )
        # Unseen actions share their smoothed frequency, the seen ones the rest.
        part = np.tile(np.log(frequency), (int(held.sum()), 1))
        rest = np.log(frequency[seen].sum())
        part[:, seen] = np.log(np.maximum(probability, _FLOOR)) + rest
        logits[held] = part
    if allowed is not None:
        logits[~allowed] = -np.inf

    def loss(log_temperature: float) -> float:
        return -float(_log_prob(logits, a, np.exp(log_temperature))[learned].mean())

    temperature = float(np.exp(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded").x))
    log_prob = _log_prob(logits, a, temperature)
    pscore = np.exp(log_prob)
    gain = (log_prob - np.log(marginal))[learned]
    error = float(gain.std()) / math.sqrt(gain.size)
    return EstimatedPropensities(
        pscore,
        temperature,
        -float(log_prob[learned].mean()),
        -float(np.log(marginal[learned]).mean()),
        float(np.mean(1.0 / pscore[learned]))
        / (num_items if allowed is None else _mean_count(allowed[learned])),
        float(gain.mean()) / error if error > 0.0 else 0.0,
    )


def _mean_count(allowed: NDArray[np.bool_]) -> float:
    return float(allowed.sum(axis=1).mean())


def _conditional_logit(
    fitted: tuple[Array, IntArray, NDArray[np.bool_]], wanted: tuple[Array, NDArray[np.bool_]]
) -> Array:
    """Fit a multinomial logit over each row's eligible items; probabilities (m, k) of other rows.

    Weights are penalized by half their square, as scikit-learn's LogisticRegression with C=1.

    fitted: (n, p) contexts, (n,) items, (n, k) eligible items. wanted: (m, p) and (m, k).
    """
    x, a, allowed = fitted
    every, (p, k) = np.arange(len(a)), (x.shape[1], allowed.shape[1])

    def scores(weights: Array, context: Array, mask: NDArray[np.bool_]) -> Array:
        matrix = weights.reshape(p + 1, k)
        return np.where(mask, context @ matrix[:p] + matrix[p], -np.inf)

    def loss(weights: Array) -> tuple[float, Array]:
        score = scores(weights, x, allowed)
        log_probability = score - logsumexp(score, axis=1, keepdims=True)
        error = np.exp(log_probability)
        error[every, a] -= 1.0
        slope = weights.reshape(p + 1, k).copy()
        slope[p] = 0.0
        penalty = 0.5 * float(np.square(slope).sum())
        slope[:p] += x.T @ error
        slope[p] = error.sum(axis=0)
        return penalty - float(log_probability[every, a].sum()), slope.ravel()

    found = minimize(
        loss, np.zeros((p + 1) * k), jac=True, method="L-BFGS-B", options={"maxiter": 500}
    )
    score = scores(found.x, *wanted)
    top = score.max(axis=1, keepdims=True)
    mass = np.exp(score - np.where(np.isfinite(top), top, 0.0))
    # A row may have none of the items that the fitted rows showed.
    return np.asarray(mass / np.maximum(mass.sum(axis=1, keepdims=True), _FLOOR))


def _log_prob(logits: Array, action: IntArray, temperature: float) -> Array:
    scaled = logits / temperature
    picked = scaled[np.arange(action.size), action]
    return np.asarray(picked - logsumexp(scaled, axis=1), dtype=np.float64)


def _folds(key: NDArray[Any], folds: int, seed: int) -> IntArray:
    """A fold for each row, the same for rows of the same key; sizes (in keys) differ by one."""
    unique, where = np.unique(key, return_inverse=True)
    order = np.random.default_rng(seed).permutation(unique.size)
    return np.asarray((order % folds)[where], dtype=np.int64)


@dataclass(frozen=True)
class LoggedProbability:
    """Estimated pi_0 of what was logged, by row number in the log."""

    row: IntArray
    estimated: EstimatedPropensities

    def of(self, rows: EncodedRows) -> Array:
        """(n,) of a batch."""
        return self.estimated.pscore[np.searchsorted(self.row, rows.row)]

    def filled(self, rows: EncodedRows) -> EncodedRows:
        """The batch with these as its propensities, of the kind that the schema states."""
        pscore = self.of(rows)
        if rows.rounds is not None:
            single = torch.from_numpy(np.log(pscore))
            conditional = conditional_log_prob(single, rows.rounds)
            if rows.pscore_kind == "slate":
                conditional = round_sum(conditional, rows.rounds)
            pscore = np.exp(conditional.numpy())
        return replace(rows, pscore=pscore)


def estimate_logged(
    log: ParquetLog,
    catalogue: Catalogue,
    encoding: FeatureEncoding,
    label: IntArray | None,
    seed: int,
    progress: Progress,
) -> LoggedProbability:
    """A calibrated model of the logging policy, cross-fitted on the evaluated log.

    Of slates (pscore_kind conditional, pscore null) it is the model of a single draw, fitted on
    position 0; the conditional probabilities of the others follow.

    label: (N,) cluster of each item, to estimate the clusters' probabilities; None for the items'.
    Raises ConfigError for a log of more than MAX_ROWS rows, OfftowerError for more than MAX_ITEMS
    items.
    """
    if log.schema.weight is not None:
        raise ConfigError(
            "propensities cannot be estimated from rows with weights (column "
            f"'{log.schema.weight}'): log them, or use a log that was not down-sampled"
        )
    if log.num_rows > MAX_ROWS:
        raise ConfigError(
            f"propensities are estimated from up to {MAX_ROWS:,} rows, and this log has "
            f"{log.num_rows:,}; log them, or pass a part of the log with --log"
        )
    progress.start("estimating propensities", None)
    contexts, actions, users, rows, allowed, firsts = [], [], [], [], [], []
    num_items = catalogue.num_items if label is None else int(label.max()) + 1
    clusters = np.arange(catalogue.num_items, dtype=np.int64) if label is None else label
    for batch in scan(log, catalogue, encoding, _SCAN_ROWS):
        contexts.append(flatten(encoding, batch.context, len(batch), "log").astype(np.float32))
        actions.append(batch.action)
        rows.append(batch.row)
        if batch.user_id is not None or batch.rounds is not None:
            users.append(batch.unit_key)
        if batch.rounds is not None:
            firsts.append(batch.rounds.position == 0)
        if batch.eligible is not None:
            counts = batch.eligible.items.cluster_counts(batch.eligible, clusters, num_items)
            allowed.append(counts > 0)
    action = np.concatenate(actions)
    estimated = estimate_propensities(
        np.concatenate(contexts),
        action if label is None else label[action],
        num_items,
        user=np.concatenate(users) if users else None,
        eligible=np.concatenate(allowed) if allowed else None,
        # Items below position 0 are draws from what the ones above have left.
        fitted=np.concatenate(firsts) if firsts else None,
        seed=seed,
    )
    progress.finish()
    if estimated.gain_z < _WORSE_Z:
        raise DataError(
            "the propensities cannot be estimated from this log: held out, their model predicts "
            f"the logged items worse than the items' frequencies do (log loss "
            f"{estimated.log_loss:.4g} against {estimated.marginal_log_loss:.4g}, "
            f"{-estimated.gain_z:.1f} standard errors). More rows, or fewer context features, may "
            "help; logging the propensities does (docs/how-to/without-propensities.md)"
        )
    return LoggedProbability(np.concatenate(rows), estimated)
