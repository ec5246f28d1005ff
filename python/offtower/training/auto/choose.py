"""The choice between candidates and sharpnesses, from held-out rows alone.

The value of a policy is estimated doubly robustly, with the share of the model's part that the log
can vouch for:

    V = mean_i [ w_i (r_i - q_i) + kappa m_i ],   kappa = min(1, mean w + 2 SE(mean w))

Weights have mean 1 where the log shows what the policy plays. A policy that lives on items which
the log never shows has weights near 0: DR then repeats what the model promises, and kappa takes
that promise away (rewards are counted from the least that is possible).

Where rows are few for so many items, a sharp policy that the log does support has weights of 0 in
all rows by chance: with n rows of N items shown alike, no row shows what it plays with probability
exp(-n / N). The rows seen know nothing of that, so SE counts a row more, of weight mean 1 / pscore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from offtower.training.auto.judge import SHARPNESS, Judged

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """One candidate at one sharpness."""

    name: str
    factor: float
    """Of the candidate's logits."""
    contribution: Array
    """(n,) of the value's estimate."""
    value: float
    low: float
    """One-sided lower bound of the value."""
    mean_weight: float
    vouched: float
    """kappa: the share of the policy's mass that the log can vouch for."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and between what."""

    chosen: Scored
    sharpest: Mapping[str, Scored]
    """Each candidate at the sharpness that was chosen for it."""
    scored: Mapping[str, Sequence[Scored]]
    """Each candidate at every sharpness, softest first."""


def choose(
    judged: Judged,
    order: Sequence[str],
    *,
    least_reward: float = 0.0,
    confidence: float = 0.95,
    doubt: float = 1.0,
    proof: float = 2.0,
) -> Choice:
    """Pick a candidate and its sharpness.

    Within a candidate the sharpest policy is taken that no softer one beats by more than `doubt`
    standard errors of the paired difference: if a score ranks items by what the log says of them,
    the value rises with sharpness. Between candidates the first of `order` stands until another
    beats it by more than `proof` standard errors. Where the first is off the log, with kappa below
    1, its value is so noisy that no difference to it is significant: there another's lower bound
    above its estimate is enough.

    Args:
        judged: held-out rows.
        order: names, in the order of belief.
        least_reward: rewards are counted from it.
        confidence: of the lower bounds, one-sided.
        doubt, proof: standard errors.
    """
    scored = {
        name: [
            _score(judged, name, s / judged.scale[name], least_reward, confidence)
            for s in SHARPNESS
        ]
        for name in order
    }
    sharpest = {name: _sharpest(options, judged, doubt) for name, options in scored.items()}
    chosen = sharpest[order[0]]
    for name in order[1:]:
        other = sharpest[name]
        off_the_log = chosen.vouched < 1.0 and other.low > chosen.value
        if off_the_log or _beats(other, chosen, judged, proof):
            chosen = other
    return Choice(chosen, sharpest, scored)


def _score(judged: Judged, name: str, factor: float, least: float, confidence: float) -> Scored:
    weight = judged.weight[name, factor]
    mean_weight = float(weight.mean())
    unseen = judged.inverse_pscore / len(weight)
    vouched = min(1.0, mean_weight + 2.0 * float(np.hypot(_standard_error(weight, judged), unseen)))
    model = vouched * (judged.expected[name, factor] - least)
    contribution = weight * (judged.reward - judged.action_reward) + model + least
    if not judged.loss:
        # Without a model of rewards: IPS of rewards counted from the least.
        contribution = weight * (judged.reward - least) + least
    value = float(contribution.mean())
    units = len(weight) if judged.unit is None else int(judged.unit.max()) + 1
    quantile = float(stdtrit(max(1, units - 1), confidence))
    low = value - quantile * _standard_error(contribution, judged)
    return Scored(name, factor, contribution, value, low, mean_weight, vouched)


def _sharpest(options: Sequence[Scored], judged: Judged, doubt: float) -> Scored:
    for place in reversed(range(len(options))):
        if not any(_beats(softer, options[place], judged, doubt) for softer in options[:place]):
            return options[place]
    return options[0]


def _beats(one: Scored, other: Scored, judged: Judged, doubt: float) -> bool:
    difference = one.contribution - other.contribution
    return float(difference.mean()) > doubt * _standard_error(difference, judged)


def _standard_error(values: Array, judged: Judged) -> float:
    """Of the mean; rows of one user, or of one context, hang together."""
    sums = values - values.mean()
    if judged.unit is not None:
        # A policy that is wrong about a context is wrong in all rows that repeat it.
        sums = np.bincount(judged.unit, weights=sums)
    units = len(sums)
    if units < 2:
        return float("inf")
    return float(np.sqrt(np.square(sums).sum() * units / (units - 1)) / len(values))
