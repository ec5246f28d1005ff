"""The choice between candidates, inverse temperatures and the logging policy, on held-out rows.

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

That is enough to compare policies, and not enough to replace the logging policy, whose value the
log shows without any weight. A candidate qualifies when one of its policies is not worse than the
logging policy by more than the tolerated loss, by the bounds of `estimates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from offtower.training.auto.estimates import (
    CandidateEstimate,
    Levels,
    estimate_policies,
    mean_error,
)
from offtower.training.auto.held_out import CandidatePolicy, HeldOutRows
from offtower.training.auto.prior_order import CLONE

_WITHIN_CANDIDATE = 1.0
_BETWEEN_CANDIDATES = 2.0
"""Standard errors of a paired difference that count as evidence."""


@dataclass(frozen=True)
class Tolerance:
    """When a candidate may replace the logging policy.

    Attributes:
        loss: the largest loss of value against the logging policy, in units of the reward.
        risk: probability of a larger one.
    """

    loss: float
    risk: float = 0.01


@dataclass(frozen=True)
class Undecided:
    """A candidate of which the log shows too little to replace the logging policy.

    Attributes:
        value: its estimated value (confidence 1/2), above that of the logging policy.
        inverse_temperature: of the policy that needs the fewest rows.
        times: as many rows as there are would be enough, about: bounds are as far below estimates
            as one over the square root of the number of rows.
    """

    value: float
    inverse_temperature: float
    times: float


@dataclass(frozen=True)
class Choice:
    """The chosen estimate and the alternatives."""

    chosen: CandidateEstimate
    """Of the policy to deliver."""
    keep_logging: bool
    """Whether no candidate qualifies to replace the logging policy; `chosen` then imitates it."""
    logging: float
    """Estimated value of the logging policy, the mean reward."""
    low: float
    """Lower bound of the value of the delivered policy, valid under the choice. If its policy is
    sharper than the log can show, it is the bound of a softer one with the same scores."""
    value: float
    """Estimated value of the delivered policy, without the excess of the highest of several noisy
    estimates, likewise."""
    best: Mapping[str, CandidateEstimate]
    """Each candidate at the inverse temperature chosen for it."""
    estimates: Mapping[str, Sequence[CandidateEstimate]]
    """Each candidate at every inverse temperature, in ascending order."""
    undecided: Mapping[str, Undecided]
    """Candidates that may be better than the logging policy, without the evidence to replace it."""

    @property
    def advice(self) -> str | None:
        """A sentence for the user where the logging policy should stay; else None."""
        if not self.keep_logging:
            return None
        name = min(self.undecided, key=lambda name: self.undecided[name].times, default=None)
        more = ""
        if name is not None:
            one = self.undecided[name]
            more = (
                f". {name} has an estimated value of {one.value:.4g}, which about {one.times:.1f} "
                "times as many rows would show"
            )
        return (
            "keep the logging policy: the log does not show that any candidate is as good as it "
            f"(mean reward {self.logging:.4g}). The learned policy imitates it; log more rows, or "
            f"let a share of them explore{more}"
        )


def choose(
    rows: HeldOutRows,
    order: Sequence[str],
    *,
    min_reward: float = 0.0,
    confidence: float = 0.95,
    tolerance: Tolerance | None = None,
    dropped: int = 0,
) -> Choice:
    """Choose a candidate and its inverse temperature, or keep the logging policy.

    Candidates that qualify have a policy whose gain over the logging policy is at least minus the
    tolerated loss, by its lower bound. If there is none, an imitation of the logging policy is
    chosen (`_imitations`), or without one the candidate with the highest bound. That the clone
    itself loses nothing says nothing about the order of its scores: it qualifies only at inverse
    temperatures above 1 at which its own bound is high enough. Likewise a policy that tilts a base
    measure less than by the unit qualifies by a gain alone.

    Within a candidate, take the largest inverse temperature that no smaller one beats by more than
    one standard error of the paired difference: if scores rank items correctly, the value rises
    with the inverse temperature. Between candidates, the first of `order` stands until another one
    beats it by more than two standard errors. If the first is off the log (kappa < 1), its value is
    too noisy for significant differences; then another candidate's lower bound above its estimate
    suffices.

    Args:
        order: names in prior order.
        min_reward: the smallest possible reward.
        confidence: of the one-sided lower bounds of values.
        tolerance: against the logging policy; None qualifies every candidate.
        dropped: candidates that left before, by evidence of the same rows. Bounds hold for all that
            entered: those of `order` have their share of the error (Bonferroni).
    """
    share = len(order) / (len(order) + dropped)
    risk = (tolerance or Tolerance(0.0)).risk
    levels = Levels(min_reward, confidence, 1.0 - risk, share)
    policies = [policy for name in order for policy in rows.policies(name)]
    found = estimate_policies(rows, policies, levels)
    estimates = {name: [one for one in found if one.name == name] for name in order}
    least = -float("inf") if tolerance is None else -tolerance.loss
    best = {name: _sharpest(options, rows) for name, options in estimates.items()}
    evidence = dict(estimates)
    if CLONE in best and tolerance is not None:
        sharper = [
            one
            for one in estimates[CLONE]
            if one.inverse_temperature > 1.0 and one.gain_lower_bound >= least
        ]
        evidence[CLONE] = sharper
        best[CLONE] = _sharpest(sharper, rows) if sharper else _imitation(estimates[CLONE], rows)
    for name in rows.based & estimates.keys():
        evidence[name] = [
            one
            for one in estimates[name]
            if one.inverse_temperature * rows.scale[name] >= 0.99 or one.gain_lower_bound > 0.0
        ]
    qualified = [
        name for name in order if any(one.gain_lower_bound >= least for one in evidence[name])
    ]
    if not qualified:
        imitations = _imitations(best, estimates, rows)
        chosen = (
            max(imitations, key=lambda one: _log_weight(one, rows))
            if imitations
            else best[max(found, key=lambda one: one.gain_lower_bound).name]
        )
    else:
        chosen = best[qualified[0]]
        for name in qualified[1:]:
            other = best[name]
            off_the_log = chosen.support_factor < 1.0 and other.low > chosen.value
            if off_the_log or _beats(other, chosen, rows, _BETWEEN_CANDIDATES):
                chosen = other
    softer = [
        one
        for one in estimates[chosen.name]
        if one.inverse_temperature <= chosen.inverse_temperature
    ]
    logging = float(rows.mean(rows.reward))
    lost = {
        name: _undecided(evidence[name], logging, least) for name in order if name not in qualified
    }
    return Choice(
        chosen,
        keep_logging=not qualified,
        logging=logging,
        low=max(one.lower_bound for one in softer),
        value=max(one.middle for one in softer),
        best=best,
        estimates=estimates,
        undecided={name: one for name, one in lost.items() if one is not None},
    )


def _undecided(
    options: Sequence[CandidateEstimate], logging: float, least: float
) -> Undecided | None:
    """What would decide on a candidate that did not qualify; None without an estimated gain."""
    found = None
    for one in options:
        gain = one.middle - logging
        if gain > 0.0 and isfinite(one.gain_lower_bound):
            times = ((gain - one.gain_lower_bound) / (gain - least)) ** 2
            if found is None or times < found.times:
                found = Undecided(one.middle, one.inverse_temperature, times)
    return found


def _imitations(
    best: Mapping[str, CandidateEstimate],
    estimates: Mapping[str, Sequence[CandidateEstimate]],
    rows: HeldOutRows,
) -> list[CandidateEstimate]:
    """The clone of the logging policy, and base measures alone."""
    found = [best[CLONE]] if CLONE in best else []
    return found + [options[0] for name, options in estimates.items() if name in rows.based]


def _log_weight(one: CandidateEstimate, rows: HeldOutRows) -> float:
    """Minus the divergence KL(logging policy || policy), up to the error of the rows."""
    weight = rows.terms[CandidatePolicy(one.name, one.inverse_temperature)].weight
    return float(rows.mean(np.log(np.maximum(weight, 1e-300))))


def _imitation(options: Sequence[CandidateEstimate], rows: HeldOutRows) -> CandidateEstimate:
    """The clone as it is, or sharper where each step beats the one before by a standard error:
    noise in scores makes a policy softer than the one that it imitates."""
    chosen, *sharper = (one for one in options if one.inverse_temperature >= 1.0)
    for one in sharper:
        if not _beats(one, chosen, rows, _WITHIN_CANDIDATE):
            break
        chosen = one
    return chosen


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
    return float(rows.mean(difference)) > errors * mean_error(difference, rows)
