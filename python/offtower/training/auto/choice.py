"""The choice between candidates and inverse temperatures, from held-out rows.

The value of a policy is estimated doubly robustly, with the model's part scaled by a support
factor kappa:

    V = mean_i [ w_i (r_i - q_i) + kappa m_i ],   kappa = min(1, mean w + 2 SE(mean w))

Weights have mean 1 where the log covers the policy's items. A policy that plays items which the log
never shows has weights near 0: DR then repeats the model's prediction, and kappa removes it
(rewards are counted from the smallest possible one).

With few rows for many items, a sharp policy within the log's support can have weights of 0 in all
rows by chance: of n rows over N equally shown items, none shows the policy's item with probability
exp(-n / N). The observed rows carry no information about that, so the standard error includes one
additional row with the mean weight of 1 / pscore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from offtower.training.auto.held_out import CandidatePolicy, HeldOutRows

Array = NDArray[np.float64]

_WITHIN_CANDIDATE = 1.0
_BETWEEN_CANDIDATES = 2.0
"""Standard errors of a paired difference that count as evidence."""


@dataclass(frozen=True)
class CandidateEstimate:
    """The estimated value of one candidate at one inverse temperature."""

    name: str
    inverse_temperature: float
    contribution: Array
    """(n,) of the estimate."""
    value: float
    low: float
    """One-sided lower bound of the value."""
    mean_weight: float
    support_factor: float
    """kappa."""


@dataclass(frozen=True)
class Choice:
    """The chosen estimate and the alternatives."""

    chosen: CandidateEstimate
    best: Mapping[str, CandidateEstimate]
    """Each candidate at the inverse temperature chosen for it."""
    estimates: Mapping[str, Sequence[CandidateEstimate]]
    """Each candidate at every inverse temperature, in ascending order."""


def choose(
    rows: HeldOutRows,
    order: Sequence[str],
    *,
    min_reward: float = 0.0,
    confidence: float = 0.95,
) -> Choice:
    """Choose a candidate and its inverse temperature.

    Within a candidate, take the largest inverse temperature that no smaller one beats by more than
    one standard error of the paired difference: if scores rank items correctly, the value rises
    with the inverse temperature. Between candidates, the first of `order` stands until another one
    beats it by more than two standard errors. If the first is off the log (kappa < 1), its value is
    too noisy for significant differences; then another candidate's lower bound above its estimate
    suffices.

    Args:
        order: names in prior order.
        min_reward: the smallest possible reward.
        confidence: of the one-sided lower bounds.
    """
    estimates = {
        name: [_estimate(rows, policy, min_reward, confidence) for policy in rows.policies(name)]
        for name in order
    }
    best = {name: _sharpest(options, rows) for name, options in estimates.items()}
    chosen = best[order[0]]
    for name in order[1:]:
        other = best[name]
        off_the_log = chosen.support_factor < 1.0 and other.low > chosen.value
        if off_the_log or _beats(other, chosen, rows, _BETWEEN_CANDIDATES):
            chosen = other
    return Choice(chosen, best, estimates)


def _estimate(
    rows: HeldOutRows, policy: CandidatePolicy, min_reward: float, confidence: float
) -> CandidateEstimate:
    terms = rows.terms[policy]
    weight = terms.weight
    mean_weight = float(weight.mean())
    one_more = rows.inverse_pscore / len(weight)
    error = float(np.hypot(_standard_error(weight, rows), one_more))
    support_factor = min(1.0, mean_weight + 2.0 * error)
    model = support_factor * (terms.expected_reward - min_reward)
    contribution = weight * (rows.reward - rows.action_reward) + model + min_reward
    if not rows.loss:
        # Without a reward model: IPS of rewards counted from the smallest one.
        contribution = weight * (rows.reward - min_reward) + min_reward
    value = float(contribution.mean())
    units = len(weight) if rows.unit is None else int(rows.unit.max()) + 1
    quantile = float(stdtrit(max(1, units - 1), confidence))
    low = value - quantile * _standard_error(contribution, rows)
    return CandidateEstimate(
        policy.name,
        policy.inverse_temperature,
        contribution,
        value,
        low,
        mean_weight,
        support_factor,
    )


def _sharpest(options: Sequence[CandidateEstimate], rows: HeldOutRows) -> CandidateEstimate:
    for index in reversed(range(len(options))):
        softer = options[:index]
        if not any(_beats(one, options[index], rows, _WITHIN_CANDIDATE) for one in softer):
            return options[index]
    return options[0]


def _beats(
    one: CandidateEstimate, other: CandidateEstimate, rows: HeldOutRows, errors: float
) -> bool:
    difference = one.contribution - other.contribution
    return float(difference.mean()) > errors * _standard_error(difference, rows)


def _standard_error(values: Array, rows: HeldOutRows) -> float:
    """Standard error of the mean, clustered by user or repeated context."""
    sums = values - values.mean()
    if rows.unit is not None:
        # A policy that is wrong about a context is wrong in all rows that repeat it.
        sums = np.bincount(rows.unit, weights=sums)
    units = len(sums)
    if units < 2:
        return float("inf")
    return float(np.sqrt(np.square(sums).sum() * units / (units - 1)) / len(values))
