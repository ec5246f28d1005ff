"""Values of candidates' policies on held-out rows, with bounds that hold for all of them at once.

Two estimates of a policy's value differ in the mass that it has on items off the log:

- `value` scales the reward model's part by the upper end of what the weights allow; policies are
  compared by it.
- `lower_bound`, `gain_lower_bound` and `middle` scale it by the covered share, the lower end. Mass
  beyond it counts as the smallest reward.

Few rows, or none, have a weight under a sharp policy. The model's prediction for it then stands
uncorrected, and a policy that maximizes predictions plays the items of which they are too high. The
bounds are the smallest values that the rows do not contradict: a value v below the prediction m
would show as residuals of m - v, in the rows that have a weight. IPS bounds the value without the
model where that is all that is known.

The bounds are simultaneous: with the stated probability all of them hold, so they hold for a policy
that was chosen by them (maximal studentized mean, Chernozhukov, Chetverikov and Kato 2013).
`middle` is the bound at confidence 1/2: the largest of several noisy estimates is too high, and
with at least this probability no policy's `middle` is.
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
        share: of the error that these policies may use, where others were compared before.
    """

    min_reward: float
    confidence: float
    gain_confidence: float
    share: float = 1.0

    def of(self, confidence: float) -> float:
        """The joint confidence of these policies' bounds."""
        return 1.0 - self.share * (1.0 - confidence)


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
    middle: float
    """Of the value, at confidence 1/2; likewise."""


@dataclass(frozen=True)
class _Bounds:
    covered_share: float
    value: float
    gain: float
    middle: float


def estimate_policies(
    rows: HeldOutRows, policies: Sequence[CandidatePolicy], levels: Levels
) -> list[CandidateEstimate]:
    """Estimate the value of each policy, and bounds that hold for all of them at once."""
    moments = [unseen_second_moment(rows, policy) for policy in policies]
    covered = [
        _covered(rows, policy, moment) for policy, moment in zip(policies, moments, strict=True)
    ]
    unseen = [
        _unseen(rows, policy, moment, levels.min_reward, share)
        for policy, moment, share in zip(policies, moments, covered, strict=True)
    ]
    cautious = np.stack(
        [
            _contribution(rows, policy, share, levels.min_reward)
            for policy, share in zip(policies, covered, strict=True)
        ],
        axis=1,
    )
    weights = np.stack([rows.terms[policy].weight for policy in policies], axis=1)
    plain = weights * (rows.reward - levels.min_reward)[:, None] + levels.min_reward
    values = _Values(cautious, plain, levels.min_reward)
    low = _lower_bounds(values, unseen, rows, levels.of(levels.confidence))
    middle = _lower_bounds(values, unseen, rows, levels.of(0.5))
    gains = values.less(rows.reward, float(rows.mean(rows.reward)))
    gain_low = _lower_bounds(gains, unseen, rows, levels.of(levels.gain_confidence))
    bounds = map(_Bounds, covered, low.tolist(), gain_low.tolist(), middle.tolist())
    return [
        _estimate(rows, policy, levels, one) for policy, one in zip(policies, bounds, strict=True)
    ]


def mean_error(values: Array, rows: HeldOutRows) -> float:
    """Standard error of the mean, clustered by user or repeated context."""
    return float(_errors(_unit_sums(values[:, None], rows), rows.size)[0])


def whole_error(values: Array, rows: HeldOutRows) -> float:
    """Standard error of the mean if all rows that these stand for were evaluated.

    The square of a unit's sum is estimated from pairs of its rows: of a row that stands for c rows,
    c^2 x^2 has the expectation of c x^2, which is the c rows' part, plus c (c - 1) x^2.
    """
    if rows.count is None:
        return mean_error(values, rows)
    sums = _unit_sums(values[:, None], rows)
    square = np.square(values - rows.mean(values))
    alone = float(rows.count @ square)
    too_much = float((rows.count * (rows.count - 1.0)) @ square)
    units = len(sums)
    if units < 2:
        return float("inf")
    total = max(float(np.square(sums).sum()) - too_much, alone)
    return float(np.sqrt(total * units / (units - 1))) / rows.size


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
    # At confidence 1/2 both single quantiles are 0.
    widened = float(stdtrit(units - 1, level)) / single if single > 0.0 else 1.0
    return max(largest, single) * widened


def _estimate(
    rows: HeldOutRows, policy: CandidatePolicy, levels: Levels, bounds: _Bounds
) -> CandidateEstimate:
    weight = rows.terms[policy].weight
    mean_weight = float(rows.mean(weight))
    one_more = rows.inverse_pscore / rows.effective_size(weight)
    error = float(np.hypot(mean_error(weight, rows), one_more))
    support_factor = min(1.0, mean_weight + 2.0 * error)
    contribution = _contribution(rows, policy, support_factor, levels.min_reward)
    value = float(rows.mean(contribution))
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
        middle=bounds.middle,
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


def _covered(rows: HeldOutRows, policy: CandidatePolicy, moment: float) -> float:
    """The covered share; `moment` is the second one of unseen weights.

    Weights have mean 1 where the log covers the policy, so a lower bound of their mean is a lower
    bound of the covered share. It is weak for sharp policies; there, the share of all items that
    the log covers, mean 1 / (pscore x eligible items), bounds it for policies that do not seek the
    others, as long as the weights do not contradict.
    """
    weight = rows.terms[policy].weight
    mean = float(rows.mean(weight))
    error = max(mean_error(weight, rows), float(np.sqrt(moment / rows.effective_size(weight))))
    of_items = 1.0 / (rows.pscore * rows.eligible_items)
    catalogue = float(rows.mean(of_items)) - mean_error(of_items, rows)
    share = min(mean + 2.0 * error, max(mean - 2.0 * error, catalogue))
    return min(1.0, max(0.0, share))


@dataclass(frozen=True)
class _Unseen:
    """Mass of a policy that the rows have not shown."""

    weight_variance: float
    """Of the mean weight, by this mass."""
    error: float
    """Standard error of an estimate by this mass, with residuals as in the other rows."""
    one_more: float
    """Standard error by one additional row of the typical weight sum w^2 / sum w with the largest
    residual: of ten effective rows that were all rewarded, the variance is 0 and the reward is not
    certain."""
    one_more_plain: float
    """Likewise, with the largest reward in place of a residual."""
    model: float
    """Prediction of the value, less the smallest reward."""


def _unseen(
    rows: HeldOutRows, policy: CandidatePolicy, moment: float, min_reward: float, covered: float
) -> _Unseen:
    weight = rows.terms[policy].weight
    residual = rows.reward - rows.action_reward
    excess = rows.reward - min_reward
    variance = moment / rows.effective_size(weight)
    least = float(np.sqrt(float(rows.mean(np.square(residual))) * variance))
    total = float(rows.mean(weight))
    typical = float(rows.mean(np.square(weight))) / total if total > 0.0 else 0.0
    additional = max(0.0, typical - 1.0) / rows.size
    # Of the drawn rows, those of such weights stand for few.
    count = np.ones(len(weight)) if rows.count is None else rows.count
    count = np.where(weight >= typical, count, 1.0)
    one_more = additional * float((count * np.abs(residual)).max())
    one_more_plain = additional * float((count * excess).max())
    model = 0.0
    if rows.loss:
        model = covered * (float(rows.mean(rows.terms[policy].expected_reward)) - min_reward)
    return _Unseen(variance, least, one_more, one_more_plain, max(0.0, model))


def unseen_second_moment(rows: HeldOutRows, policy: CandidatePolicy) -> float:
    """Second moment of the weights of mass which the rows have not shown; over the effective number
    of rows it is a variance of the mean weight.

    Of a policy that plays one of N items, few rows have a weight, and where none has, the weights
    look certain. The mass that the rows have not shown adds its share of the second moment for
    propensities like those of the log, sum_a pi(a|x)^2 times the mean of 1 / pscore.
    """
    weight = rows.terms[policy].weight
    unseen = min(1.0, max(0.0, 1.0 - float(rows.mean(weight)) + mean_error(weight, rows)))
    return unseen * max(0.0, _second_moment(rows, policy) - 1.0)


def _second_moment(rows: HeldOutRows, policy: CandidatePolicy) -> float:
    """Mean of w^2 for propensities like those of the log.

    With probabilities p_s at inverse temperature s, p_s(a)^2 / p_2s(a) is sum_a p_s(a)^2 for every
    item a. With a base measure, to which propensities are about proportional, w_s^2 / w_2s is the
    second moment of the weights. Those of the base alone are about the same in all rows.
    """
    weight = rows.terms[policy].weight
    if policy.name in rows.based and policy == rows.policies(policy.name)[0]:
        return min(rows.inverse_pscore, float(np.square(weight).max()))
    doubled = next(
        (
            one
            for one in rows.policies(policy.name)
            if np.isclose(one.inverse_temperature, 2.0 * policy.inverse_temperature)
        ),
        None,
    )
    if doubled is None:
        return rows.inverse_pscore
    once, twice = weight, rows.terms[doubled].weight
    some = (once > 0.0) & (twice > 0.0)
    if not some.any():
        return rows.inverse_pscore
    logs = 2.0 * np.log(once[some]) - np.log(twice[some])
    count = None if rows.count is None else rows.count[some]
    if policy.name in rows.based:
        return min(rows.inverse_pscore, float(np.average(np.exp(logs), weights=count)))
    share = np.exp(np.minimum(logs + np.log(rows.pscore[some]), 0.0))
    return float(np.average(share, weights=count)) * rows.inverse_pscore


@dataclass(frozen=True)
class _Values:
    """Two estimates of the values of several policies, by row."""

    model: Array
    """(n, policies) doubly robust, with the covered share of the model's part."""
    plain: Array
    """(n, policies) IPS of rewards counted from the smallest one, as if all unseen mass had it."""
    floor: float
    """The mean if every reward were the smallest."""

    def less(self, values: Array, mean: float) -> _Values:
        """These minus (n,) values with this mean."""
        return _Values(
            self.model - values[:, None], self.plain - values[:, None], self.floor - mean
        )


def _lower_bounds(
    values: _Values, unseen: Sequence[_Unseen], rows: HeldOutRows, level: float
) -> Array:
    """(policies,) simultaneous lower bounds of the policies' values.

    With the quantile z, the doubly robust mean V, the prediction m and the variance s of the mean
    weight by unseen mass: if the value is v, that mass has residuals of about m - v, and V a
    standard error of at least sqrt(s) (m - v). The bound by the model is no more than the smallest
    v that the rows do not contradict, V - v = z sqrt(s) (m - v).

    Where that limits the bound, IPS may give a larger one, without a model: where rewards are rare,
    nearly all that few weighted rows show is in the rewarded ones.
    """
    sums = _unit_sums(values.model, rows)
    least = np.array([one.error for one in unseen])
    one_more = np.array([one.one_more for one in unseen])
    error = np.hypot(np.maximum(_errors(sums, rows.size), least), one_more)
    mean = rows.mean(values.model)
    model = values.floor + np.array([one.model for one in unseen])
    deviation = np.sqrt([one.weight_variance for one in unseen])

    def by_model(quantile: float) -> tuple[Array, Array]:
        """Bounds by all rows, and the smallest values that they do not contradict."""
        bound = mean - _times(quantile, error)
        root = _times(quantile, deviation)
        some = root < 1.0
        root = np.where(some, root, 0.0)
        return bound, np.where(some, (mean - root * model) / (1.0 - root), -np.inf)

    quantile = simultaneous_quantile(sums, level)
    bound, smallest = by_model(quantile)
    limited = np.flatnonzero(smallest < bound)
    if not rows.loss or len(limited) == 0:
        return np.asarray(bound, dtype=np.float64)
    plain_sums = _unit_sums(values.plain[:, limited], rows)
    quantile = simultaneous_quantile(np.concatenate([sums, plain_sums], axis=1), level)
    result = np.minimum(*by_model(quantile))
    more = np.array([unseen[k].one_more_plain for k in limited.tolist()])
    plain_error = np.hypot(_errors(plain_sums, rows.size), more)
    plain = rows.mean(values.plain[:, limited]) - _times(quantile, plain_error)
    result[limited] = np.maximum(result[limited], plain)
    return result


def _times(quantile: float, error: Array) -> Array:
    """The product, which is 0 where the error is, for an infinite quantile too."""
    return np.where(error > 0.0, quantile * np.where(error > 0.0, error, 1.0), 0.0)


def _unit_sums(values: Array, rows: HeldOutRows) -> Array:
    """(units, columns) sums of centered values by unit."""
    centered = values - rows.mean(values)
    if rows.count is not None:
        centered = centered * rows.count[:, None]
    if rows.unit is None:
        return np.asarray(centered, dtype=np.float64)
    # A policy that is wrong about a context is wrong in all rows that repeat it.
    units = int(rows.unit.max()) + 1
    columns = [np.bincount(rows.unit, weights=one, minlength=units) for one in centered.T]
    return np.stack(columns, axis=1)


def _errors(sums: Array, rows: float) -> Array:
    """(columns,) standard errors of means over `rows`, from centered sums of units."""
    units = len(sums)
    if units < 2:
        return np.full(sums.shape[1], np.inf)
    result: Array = np.sqrt(np.square(sums).sum(axis=0) * units / (units - 1)) / rows
    return result
