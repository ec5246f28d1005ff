"""Sentences about an evaluation, for the reader of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offtower.data.unknown import UnknownValues
from offtower.evaluation.estimators import Estimator
from offtower.evaluation.intervals.regression import least_units
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.selection.interaction import InteractionSums
from offtower.mapping import MergeTree


def unknown_notes(unknown: Mapping[str, UnknownValues]) -> list[str]:
    """Context values that a policy's training did not see."""
    return _named({name: values.sentences("rows") for name, values in unknown.items()})


def interaction_notes(sums: Mapping[str, MergeTree[InteractionSums]]) -> list[str]:
    """By policy, which interaction the log of slates does not reject."""
    return _named(
        {name: found.merged().choose().sentences() for name, found in sums.items() if found}
    )


def reward_notes(result: EvaluationResult) -> list[str]:
    """Named rewards in which a policy loses against the logging policy."""
    notes = []
    for name, policy in result.policies.items():
        for reward, found in policy.rewards.items():
            gap = found.difference
            if gap is not None and gap.interval.high < -gap.rounding:
                notes.append(
                    f"{name} loses in the reward '{reward}': {gap.estimate.value:.4g} per row "
                    f"against the logging policy ({result.confidence:.0%} interval "
                    f"{gap.interval.low:.4g} to {gap.interval.high:.4g}), whatever the weighted "
                    "sum says"
                )
    return notes


def estimator_notes(result: EvaluationResult, estimators: Sequence[Estimator]) -> list[str]:
    """Values outside of the range of rewards, and coefficients that were not fitted."""
    low, high = result.reward_range
    notes = []
    # Values of slates are sums over positions, which the range of a reward does not bound.
    slates = any(policy.positions for policy in result.policies.values())
    for name, policy in result.policies.items():
        outside = (
            []
            if slates
            else [
                f"{label} {one.estimate.value:.4g}"
                for label, one in policy.estimates.items()
                if not low <= one.estimate.value <= high
            ]
        )
        if outside:
            notes.append(
                f"{name}: {', '.join(outside)} lies outside of the rewards' range [{low:g}, "
                f"{high:g}], which too few rows, wrong propensities or a reward model far off "
                "explain. Gamma intervals hold possible values only: one outside is moved to "
                "the nearest of them"
            )
    units = result.n if result.users is None else result.users
    for one in estimators:
        if units < least_units(one.controls):
            notes.append(
                f"{one.name} fits no coefficients to {units} independent rows or users; it needs "
                f"{least_units(one.controls)}"
            )
    return notes


def _named(sentences: Mapping[str, Sequence[str]]) -> list[str]:
    """Notes that name the policies which a sentence holds for."""
    names: dict[str, list[str]] = {}
    for name, own in sentences.items():
        for sentence in own:
            names.setdefault(sentence, []).append(name)
    return [f"{', '.join(holders)}: {sentence}" for sentence, holders in names.items()]
