"""Values of candidates' policies on held-out rows, with bounds that hold for all of them at once.

Two estimates of a policy's value differ in the mass that it has on items off the log:

- `value` scales the reward model's part by the upper end of what the weights allow; policies are
  compared by it.
- `lower_bound` and `gain_lower_bound` scale it by the covered share, the lower end. Mass beyond it
  counts as the smallest reward.

The bounds are simultaneous: with the stated probability all of them hold, so they hold for a policy
that was chosen by them (maximal studentized mean, Chernozhukov, Chetverikov and Kato 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from offtower.training.auto.held_out import CandidatePolicy, HeldOutRows

Array = NDArray[np.float64]

_DRAWS = 4096
"""Of the maximal studentized mean."""


@dataclass(frozen=True)
class Levels:
    """Confidence of the bounds.

    Attributes:
        min_reward: the smallest possible reward.
        confidence: of the one-sided lower bounds of values.
        gain_confidence: of the one-sided lower bounds of gains over the logging policy.
    """

    min_reward: float
    confidence: float
    gain_confidence: float


@dataclass(frozen=True)
class CandidateEstimate:
    """The estimated value of one candidate at one inverse temperature."""

    name: str
    inverse_temperature: float
    contribution: Array
    """(n,) of the estimate."""
    value: float
    low: float
    """One-sided lower bound of the value, for this policy alone and a log that covers it."""
    mean_weight: float
    support_factor: float
    """kappa."""
    covered_share: float
    """Share of the policy's mass that the log covers, at least."""
    lower_bound: float
    """Of the value; of all policies at once, with other mass counted as the smallest reward."""
    gain_lower_bound: float
    """Of the value less that of the logging policy; likewise."""


@dataclass(frozen=True)
class _Bounds:
    covered_share: float
    value: float
    gain: float


def estimate_policies(
    rows: HeldOutRows, policies: Sequence[CandidatePolicy], levels: Levels
) -> list[CandidateEstimate]:
    """Estimate the value of each policy, and bounds that hold for all of them at once."""
    covered = [_covered(rows, policy) for policy in policies]
    unseen = np.array([_unseen_errors(rows, policy) for policy in policies])
    cautious = np.stack(
        [
            _contribution(rows, policy, share, levels.min_reward)
            for policy, share in zip(policies, covered, strict=True)
        ],
        axis=1,
    )
    low = _lower_bounds(cautious, unseen, rows, levels.confidence)
    gain = cautious - rows.reward[:, None]
    gain_low = _lower_bounds(gain, unseen, rows, levels.gain_confidence)
    return [
        _estimate(rows, policy, levels, _Bounds(share, float(bound), float(gain_bound)))
        for policy, share, bound, gain_bound in zip(policies, covered, low, gain_low, strict=True)
    ]


def mean_error(values: Array, rows: HeldOutRows) -> float:
    """Standard error of the mean, clustered by user or repeated context."""
    return float(_errors(_unit_sums(values[:, None], rows), len(values))[0])


def simultaneous_quantile(sums: Array, level: float) -> float:
    """Quantile of the largest studentized mean of several columns.

    Args:
        sums: (units, columns) centered sums of independent units.
        level: probability that no column's mean exceeds its expectation by more standard errors.

    The correlated normal quantile is widened as Student's t is at this number of units.
    """
    single = float(ndtri(level))
    units, columns = sums.shape
    if units < 2:
        return float("inf")
    deviation = np.sqrt(np.square(sums).sum(axis=0))
    scaled = sums / np.where(deviation > 0.0, deviation, 1.0)
    value, vector = np.linalg.eigh(scaled.T @ scaled)
    root = vector * np.sqrt(value.clip(min=0.0))
    normal = np.random.default_rng(0).standard_normal((_DRAWS, columns))
    largest = float(np.quantile((normal @ root.T).max(axis=1), level))
    return max(largest, single) * float(stdtrit(units - 1, level)) / single


def _estimate(
    rows: HeldOutRows, policy: CandidatePolicy, levels: Levels, bounds: _Bounds
) -> CandidateEstimate:
    weight = rows.terms[policy].weight
    mean_weight = float(weight.mean())
    one_more = rows.inverse_pscore / len(weight)
    error = float(np.hypot(mean_error(weight, rows), one_more))
    support_factor = min(1.0, mean_weight + 2.0 * error)
    contribution = _contribution(rows, policy, support_factor, levels.min_reward)
    value = float(contribution.mean())
    units = len(weight) if rows.unit is None else int(rows.unit.max()) + 1
    quantile = float(stdtrit(max(1, units - 1), levels.confidence))
    return CandidateEstimate(
        policy.name,
        policy.inverse_temperature,
        contribution=contribution,
        value=value,
        low=value - quantile * mean_error(contribution, rows),
        mean_weight=mean_weight,
        support_factor=support_factor,
        covered_share=bounds.covered_share,
        lower_bound=bounds.value,
        gain_lower_bound=bounds.gain,
    )


def _contribution(
    rows: HeldOutRows, policy: CandidatePolicy, share: float, min_reward: float
) -> Array:
    """(n,) of the doubly robust estimate with `share` of the model's part."""
    terms = rows.terms[policy]
    if not rows.loss:
        # Without a reward model: IPS of rewards counted from the smallest one.
        return terms.weight * (rows.reward - min_reward) + min_reward
    model = share * (terms.expected_reward - min_reward)
    result: Array = terms.weight * (rows.reward - rows.action_reward) + model + min_reward
    return result


def _covered(rows: HeldOutRows, policy: CandidatePolicy) -> float:
    """The covered share.

    Weights have mean 1 where the log covers the policy, so a lower bound of their mean is a lower
    bound of the covered share. It is weak for sharp policies; there, the share of all items that
    the log covers, mean 1 / (pscore x eligible items), bounds it for policies that do not seek the
    others, as long as the weights do not contradict.
    """
    weight = rows.terms[policy].weight
    mean, variance = float(weight.mean()), weight_variance(rows, policy)
    error = max(mean_error(weight, rows), float(np.sqrt(variance)))
    of_items = 1.0 / (rows.pscore * rows.eligible_items)
    catalogue = float(of_items.mean()) - mean_error(of_items, rows)
    share = min(mean + 2.0 * error, max(mean - 2.0 * error, catalogue))
    return min(1.0, max(0.0, share))


def _unseen_errors(rows: HeldOutRows, policy: CandidatePolicy) -> tuple[float, float]:
    """The least standard error of an estimate, and the error of one additional row.

    The first is that of mass which the rows have not shown, with residuals as in the other rows.
    The second is a row of the typical weight sum w^2 / sum w with the largest residual: of ten
    effective rows that were all rewarded, the variance is 0 and the reward is not certain.
    """
    weight = rows.terms[policy].weight
    residual = rows.reward - rows.action_reward
    least = float(np.sqrt(np.square(residual).mean() * weight_variance(rows, policy)))
    total = float(weight.sum())
    typical = float(np.square(weight).sum()) / total if total > 0.0 else 0.0
    one_more = max(0.0, typical - 1.0) * float(np.abs(residual).max()) / len(weight)
    return least, one_more


def weight_variance(rows: HeldOutRows, policy: CandidatePolicy) -> float:
    """Variance of the mean weight that is due to mass which the rows have not shown.

    Of a policy that plays one of N items, few rows have a weight, and where none has, the weights
    look certain. The mass that the rows have not shown, 1 - mean w, adds that share of the variance
    for propensities like those of the log, sum_a pi(a|x)^2 times the mean of 1 / pscore.
    """
    weight = rows.terms[policy].weight
    unseen = min(1.0, max(0.0, 1.0 - float(weight.mean()) + mean_error(weight, rows)))
    second_moment = _concentration(rows, policy) * rows.inverse_pscore
    return unseen * max(0.0, second_moment - 1.0) / len(weight)


def _concentration(rows: HeldOutRows, policy: CandidatePolicy) -> float:
    """Mean of sum_a pi(a|x)^2.

    With probabilities p_s at inverse temperature s it is p_s(a)^2 / p_2s(a), for every item a.
    """
    doubled = next(
        (
            one
            for one in rows.policies(policy.name)
            if np.isclose(one.inverse_temperature, 2.0 * policy.inverse_temperature)
        ),
        None,
    )
    if doubled is None:
        return 1.0
    once, twice = rows.terms[policy].weight, rows.terms[doubled].weight
    some = (once > 0.0) & (twice > 0.0)
    if not some.any():
        return 1.0
    logs = 2.0 * np.log(once[some]) - np.log(twice[some]) + np.log(rows.pscore[some])
    return float(np.exp(np.minimum(logs, 0.0)).mean())


def _lower_bounds(values: Array, unseen: Array, rows: HeldOutRows, level: float) -> Array:
    """(policies,) simultaneous lower bounds of the means of (n, policies) values, with the
    (policies, 2) `_unseen_errors`."""
    sums = _unit_sums(values, rows)
    error = np.hypot(np.maximum(_errors(sums, len(values)), unseen[:, 0]), unseen[:, 1])
    quantile = simultaneous_quantile(sums, level)
    width = np.where(error > 0.0, quantile * np.where(error > 0.0, error, 1.0), 0.0)
    result: Array = values.mean(axis=0) - width
    return result


def _unit_sums(values: Array, rows: HeldOutRows) -> Array:
    """(units, columns) sums of centered values by unit."""
    centered = values - values.mean(axis=0)
    if rows.unit is None:
        return np.asarray(centered, dtype=np.float64)
    # A policy that is wrong about a context is wrong in all rows that repeat it.
    units = int(rows.unit.max()) + 1
    columns = [np.bincount(rows.unit, weights=one, minlength=units) for one in centered.T]
    return np.stack(columns, axis=1)


def _errors(sums: Array, rows: int) -> Array:
    """(columns,) standard errors of means over `rows`, from centered sums of units."""
    units = len(sums)
    if units < 2:
        return np.full(sums.shape[1], np.inf)
    result: Array = np.sqrt(np.square(sums).sum(axis=0) * units / (units - 1)) / rows
    return result
