"""Paired selection: variance and paired bias from the log itself, ties by a preference order.

PAS-IF, with many splits, estimates an estimator's bias by a paired difference to IPS on the pseudo
problem, and its variance over a few dozen splits. The rows of the real problem give both with less
noise. For each candidate j and the consistent candidate c of least variance,

    mse_j = var_j + E[b_j^2 | d_j],     d_j = V_j - V_c,     s_j^2 = var(influence_j - influence_c)

- a consistent candidate (IPS, SNIPS, DR, SNDR given true propensities) has b_j = 0;
- otherwise, with a flat prior on the bias, E[b^2 | d] = d^2 + s^2. That is also right for a reward
  model that learned from the same log: its errors share the log's noise, and d looks too small;
- where the candidate's reward model is declared independent of the log, the prior has a spike:
  b = 0 with probability 1/2, else b ~ N(0, 10 s^2). Then a perfect reward model can win.
  The same prior holds for an estimator of slates that is consistent if rewards do not depend on
  later items (`Candidate.assumes`).

A reward model that was cross-fitted on this very log may hide variance: fold k's model learned
from the rows of the other folds, so the folds' estimates can be correlated, which a variance over
independent rows misses. For p parameters this is of order p / n where the model cannot represent
the truth, and nothing where it can. `overlap` p / n of the variance, at most a tenth of it, is
added where p is known (`ModelPredictions.parameters`): it breaks near-ties in favor of the smaller
model. The factor was chosen on worlds kept for design. Without the limit, 442 parameters and 2,000
rows (letter, 26 items) reject the better of two models: a regret of .64, with it .00. A model of
too many parameters for the rows predicts badly, which its variance shows without a charge.

Two rules act against noise. A candidate that may be biased, without an independent model, is ranked
by mse_j plus `caution` standard errors of it. Consistent candidates within `tie_width` standard
errors of the paired difference of variances are put in an order of prior preference:
self-normalized ones first, as they do not depend on how rewards are shifted and their variance
estimates are the most stable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array
from offtower.evaluation.selection.log import SelectionLog
from offtower.evaluation.selection.problem import Candidate
from offtower.evaluation.selection.result import SelectionResult, make_result

_PREFERENCE = ("SNDR", "SNIPS", "DR", "IPS")
"""Families in order of prior preference."""
_MOST_OVERLAP = 0.1
"""Share of a candidate's variance that is added for its model's parameters, at most."""
_SPIKE, _SLAB = 0.5, 10.0
"""The prior on the bias of candidates with an independent reward model."""


def select_paired(
    log: SelectionLog,
    candidates: Sequence[Candidate],
    *,
    caution: float = 2.0,
    tie_width: float = 2.0,
    overlap: float = 3.0,
) -> SelectionResult:
    """Rank candidates by variance plus expected squared bias, both from the log's own rows.

    caution: standard errors of its mse that are added for a candidate that may be biased.
    tie_width: standard errors within which consistent candidates are tied; 0 turns the preference
    off. overlap: share of the variance added for each parameter that a model learned from the log,
    over n, and at most _MOST_OVERLAP in all. `mse` in the result is without the caution.
    Needs n of a few hundred for its normal approximations, and true propensities; no selector
    detects a bias from items outside the log's support. A consistent candidate for which no row
    carries a weight is left out. Raises OfftowerError without a consistent
    candidate.
    """
    ranked = list(candidates)
    consistent = np.array([c.is_consistent for c in ranked])
    if not consistent.any():
        raise OfftowerError(
            "method='paired' compares with a consistent estimator: add IPS, SNIPS, DR or SNDR to "
            "the candidates."
        )
    values, influence = log.problem.influence(ranked)
    # No row carries a weight, as of whole slates that the policy never shows: a value of 0 without
    # variance is no evidence.
    empty = consistent & (values == 0.0) & ~influence.any(axis=1)
    if not empty[consistent].all():
        ranked = [c for c, none in zip(ranked, empty, strict=True) if not none]
        consistent, values, influence = consistent[~empty], values[~empty], influence[~empty]
    n = log.problem.n
    squares = influence**2 / n
    charge = np.minimum(overlap / n * _learned(log, ranked), _MOST_OVERLAP)
    variance = squares.mean(axis=1) * (1.0 + charge)
    reference = int(np.argmin(np.where(consistent, variance, np.inf)))
    gap = values - values[reference]
    gap_variance = np.mean((influence - influence[reference]) ** 2, axis=1) / n
    independent = np.array([c.assumes or c.model in log.independent_models for c in ranked])
    bias = np.where(
        independent,
        spike_slab_square(gap, gap_variance, _SPIKE, _SLAB),
        gap**2 + gap_variance,
    )
    bias[consistent] = 0.0
    mse = variance + bias

    bias_noise = np.sqrt(4.0 * gap**2 * gap_variance + 2.0 * gap_variance**2)
    bias_noise[consistent] = 0.0
    noise = np.hypot(_noise(squares), bias_noise)
    charged = ~(consistent | independent)
    score = mse + np.where(
        charged, caution * np.hypot(_noise(squares - squares[reference]), bias_noise), 0.0
    )
    order = _order(ranked, score, squares, consistent, tie_width)
    first = order[0]
    margin_noise = np.hypot(
        _noise(squares - squares[first]), np.hypot(bias_noise, bias_noise[first])
    )
    margin_noise[first] = 0.0
    return make_result(
        "paired",
        ranked,
        values,
        mse,
        noise,
        margin_noise,
        order=order,
        details={
            "reference": ranked[reference].name,
            "variance": {c.name: float(v) for c, v in zip(ranked, variance, strict=True)},
            "squared_bias": {c.name: float(b) for c, b in zip(ranked, bias, strict=True)},
            "caution": caution,
            "tie_width": tie_width,
            "overlap": overlap,
        },
    )


def spike_slab_square(gap: Array, gap_variance: Array, spike: float, slab: float) -> Array:
    """E[b^2 | gap], gap ~ N(b, v = gap_variance); b = 0 with prior `spike`, else N(0, slab v)."""
    shrink = slab / (1.0 + slab)
    square = gap**2
    safe = np.where(gap_variance > 0.0, gap_variance, 1.0)
    z2 = np.where(gap_variance > 0.0, square / safe, np.where(square > 0.0, np.inf, 0.0))
    bayes = np.sqrt(1.0 + slab) * np.exp(-0.5 * np.minimum(z2, 1e4) * shrink)
    null = spike * bayes / (spike * bayes + 1.0 - spike)
    return np.asarray((1.0 - null) * (shrink**2 * square + shrink * gap_variance))


def _learned(log: SelectionLog, candidates: list[Candidate]) -> Array:
    """(c,) parameters that each candidate's reward model learned from the log."""
    return np.array(
        [
            0.0
            if c.model is None or c.model in log.independent_models
            else log.problem.models[c.model].parameters
            for c in candidates
        ]
    )


def _noise(squares: Array) -> Array:
    """Standard error of the mean of each row of squared influences: (c, n) -> (c,)."""
    return np.asarray(squares.std(axis=1) / np.sqrt(squares.shape[1]))


def _order(
    candidates: list[Candidate],
    score: Array,
    squares: Array,
    consistent: NDArray[np.bool_],
    tie_width: float,
) -> list[int]:
    order = [int(j) for j in np.argsort(score, kind="stable")]
    best = order[0]
    if tie_width <= 0.0 or not consistent[best]:
        return order
    tied = consistent & (score - score[best] <= tie_width * _noise(squares - squares[best]))
    rank = {name: place for place, name in enumerate(_PREFERENCE)}
    place = [rank.get(c.family, len(rank)) for c in candidates]
    inside = sorted((j for j in order if tied[j]), key=lambda j: (place[j], score[j]))
    return inside + [j for j in order if not tied[j]]
