"""Checks of the sums over a log against the thresholds of the section `monitor`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from scipy.special import betaincinv

from offtower.config import TimeOptions
from offtower.data.profile import LogProfile
from offtower.evaluation.drift.over_time import OverTime, TimedValue
from offtower.evaluation.drift.result import TimeResult
from offtower.evaluation.intervals.term_mean import TermMean
from offtower.monitoring.accumulator import MonitorAccumulator, MonitorPlan
from offtower.monitoring.days import DaySums, WeightSums, share_of_day
from offtower.monitoring.drift import compare_profiles
from offtower.monitoring.result import Check, Day

_FAMILIES = 4
"""Weights, features, unknown values and rewards, each with an equal share of alpha."""


@dataclass(frozen=True)
class Reference:
    """What a log is compared with.

    Attributes:
        profile: distributions of features; empty where rows have weights.
        mean_reward: of a row. name: for messages.
    """

    profile: LogProfile
    mean_reward: float
    name: str


@dataclass(frozen=True)
class Findings:
    """All checks and days of a log, and notes; units: independent rounds."""

    checks: tuple[Check, ...]
    days: tuple[Day, ...]
    notes: tuple[str, ...]
    units: int


def make_checks(plan: MonitorPlan, found: MonitorAccumulator, reference: Reference) -> Findings:
    """Compare the sums over a log with the thresholds and with a reference."""
    delta = plan.config.alpha / _FAMILIES
    total = reduce(DaySums.merge, found.days.values())
    notes: list[str] = []
    days = _days(plan, found, delta)
    checks = [
        *_weights(plan, total.weights, days, delta, notes),
        *_softer(plan, found.softer, delta),
        *_propensities(plan, found, notes),
        *_features(plan, found, reference, delta, notes),
        *_unknown(plan, found, total, delta),
        *_items(plan, found),
        _bad_rows(plan, found),
        *_values(plan, total, days, reference, delta),
        *_reward_drift(plan, found, notes),
    ]
    return Findings(tuple(checks), tuple(days), tuple(notes), total.units)


def _days(plan: MonitorPlan, found: MonitorAccumulator, delta: float) -> list[Day]:
    """Values and mean weights by day; half of each family's error is for the days."""
    made = []
    for number, key in enumerate(sorted(found.days), start=1):
        sums = found.days[key]
        share = 0.5 * delta * share_of_day(number)
        weight: tuple[float | None, float | None, float | None] = (None, None, None)
        if sums.weights is not None:
            weight = (sums.weights.mean, *sums.weights.bounds(share))
        made.append(
            Day(plan.day_name(key), sums.rows, sums.units, sums.mean, *sums.bounds(share), *weight)
        )
    return made


def _weights(
    plan: MonitorPlan,
    sums: WeightSums | None,
    days: list[Day],
    delta: float,
    notes: list[str],
) -> list[Check]:
    if sums is None:
        notes.append("no weight was computed: the sample of monitor.weight_rows rows is empty")
        return []
    most, config = plan.config.max_weight_error, plan.config
    low, high = sums.bounds(0.25 * delta)
    if high is None:
        notes.append(
            f"the mean weight has no upper bound: a weight of {sums.highest:.4g} exceeds "
            f"monitor.max_weight = {config.max_weight:g}"
        )
    above, below = _beyond(low, high, most)
    bounds = _bounds(low, high)
    text = f"mean weight {sums.mean:.4g} ({bounds}) of {sums.n:,} sampled rounds; it must be 1"
    if above:
        text += ": logged propensities are too small for how often their items are shown"
    if below:
        text += ": logged propensities are too large, or the policy shows items that the log cannot"
    found = [Check("mean_weight", "", sums.mean, most, above or below, text, low, high)]
    for day in days:
        if day.weight is None or day.weight_low is None:
            continue
        low, high = day.weight_low, day.weight_high
        if any(_beyond(low, high, most)):
            text = f"mean weight {day.weight:.4g} on {day.name}, at least {low:.4g}"
            text += "" if high is None else f", at most {high:.4g}"
            found.append(Check("mean_weight", day.name, day.weight, most, True, text, low, high))
    return found


def _softer(plan: MonitorPlan, sums: WeightSums | None, delta: float) -> list[Check]:
    """The mean weight of a softer policy, which shows whether items were shown as often as their
    propensities say, also in a log in which every weight of the policy itself is 1."""
    if sums is None:
        return []
    most, (low, high) = plan.config.max_weight_error, sums.bounds(0.25 * delta)
    above, below = _beyond(low, high, most)
    text = (
        f"mean weight of the policy at twice its temperature {sums.mean:.4g} ({_bounds(low, high)})"
    )
    if above:
        text += ": likely items were shown less often than logged, as where a client drops them"
    if below:
        text += ": likely items were shown more often than logged, as where a client sorts by score"
    return [Check("softer_mean_weight", "", sums.mean, most, above or below, text, low, high)]


def _beyond(low: float, high: float | None, most: float) -> tuple[bool, bool]:
    """Whether a mean weight with these bounds is above 1 by more than `most`, and below."""
    return low > 1.0 + most, high is not None and high < 1.0 - most


def _bounds(low: float, high: float | None) -> str:
    return f"{low:.4g} to {'?' if high is None else f'{high:.4g}'}"


def _propensities(plan: MonitorPlan, found: MonitorAccumulator, notes: list[str]) -> list[Check]:
    if not found.own:
        notes.append(
            "no row names an export of this run as its policy (column behavior_policy), so logged "
            "propensities are checked by their mean weight only"
        )
        return []
    share, most = found.unequal / found.own, plan.config.max_unequal_propensities
    text = (
        f"{share:.2%} of {found.own:,} sampled rows that this run served have another propensity "
        "than its policy gives"
    )
    if share > most:
        text += ": the log, its features, the catalogue or the section serving were changed"
    return [Check("unequal_propensities", "", share, most, share > most, text)]


def _features(
    plan: MonitorPlan,
    found: MonitorAccumulator,
    reference: Reference,
    delta: float,
    notes: list[str],
) -> list[Check]:
    if not reference.profile.units:
        notes.append(
            f"drift of features was not tested: rows of {reference.name} have weights, so that "
            "their features are not distributed as those of what was served. Name a whole log with "
            "--reference"
        )
    most, made = plan.config.max_feature_drift, []
    for one in compare_profiles(reference.profile, found.sample.profile(), delta):
        text = (
            f"'{one.name}' differs by {one.distance:.3g} (at least {one.low:.3g}) from "
            f"{reference.name}: {one.change}; stability index {one.stability_index:.3g}"
        )
        made.append(
            Check("feature_drift", one.name, one.distance, most, one.low > most, text, one.low)
        )
    return made


def _unknown(
    plan: MonitorPlan, found: MonitorAccumulator, total: DaySums, delta: float
) -> list[Check]:
    """Clopper and Pearson's bounds; rows of one round count as one."""
    counts, most = found.unknown, plan.config.max_unknown
    names = [s.name for s in plan.scorer.context_encoding.specs if s.name in counts.unknown]
    made = []
    for name in names:
        unseen = counts.unknown[name] - counts.missing[name]
        share = unseen / counts.rows
        hits = share * total.units
        rest = total.units - hits + 1.0
        low = float(betaincinv(hits, rest, delta / len(names))) if hits > 0.0 else 0.0
        text = f"{share:.2%} of rows have a value of '{name}' that training did not see"
        if counts.missing[name]:
            text += f", and {counts.missing[name] / counts.rows:.2%} have none"
        made.append(Check("unknown_values", name, share, most, low > most, text, low))
    return made


def _items(plan: MonitorPlan, found: MonitorAccumulator) -> list[Check]:
    config, shown, total = plan.config, len(found.items), plan.catalogue.num_items
    lacking = found.unknown_ids.key.size << found.unknown_ids.shift
    share, unknown = shown / total, lacking / max(1, lacking + shown)
    text = f"the catalogue lacks {lacking:,} of the log's {lacking + shown:,} items"
    if lacking:
        rows = found.unknown_rows / found.rows
        text += f" ({', '.join(found.unknown_examples)}; {rows:.2%} of rows, left out)"
    return [
        Check(
            "items_shown",
            "",
            share,
            config.min_items_shown,
            share < config.min_items_shown,
            f"{shown:,} of {total:,} items are shown ({share:.2%})",
        ),
        Check(
            "unknown_items",
            "",
            unknown,
            config.max_unknown_items,
            unknown > config.max_unknown_items,
            text,
        ),
    ]


def _bad_rows(plan: MonitorPlan, found: MonitorAccumulator) -> Check:
    share, most = found.bad / found.rows, plan.config.max_bad_rows
    text = f"{found.bad:,} of {found.rows:,} rows break the log's schema"
    if found.bad:
        text += f", and are left out: {'; '.join(found.examples)}"
    return Check("bad_rows", "", share, most, share > most, text)


def _values(
    plan: MonitorPlan, total: DaySums, days: list[Day], reference: Reference, delta: float
) -> list[Check]:
    limits = []
    if plan.config.min_value is not None:
        limits.append((plan.config.min_value, "monitor.min_value"))
    fall = plan.config.max_value_fall
    if fall is not None and reference.mean_reward > 0.0:
        why = f"{1.0 - fall:.0%} of the {reference.mean_reward:.4g} of {reference.name}"
        limits.append(((1.0 - fall) * reference.mean_reward, why))
    least, why = max(limits, default=(None, ""))
    low, high = total.bounds(0.5 * delta)
    text = f"mean reward {total.mean:.4g} ({low:.4g} to {high:.4g})"
    if least is not None:
        text += f"; at least {least:.4g} is wanted, {why}"
    breached = least is not None and high < least
    found = [Check("value", "", total.mean, least, breached, text, low, high)]
    for day in days:
        if least is not None and day.value_high < least:
            text = (
                f"mean reward {day.value:.4g} on {day.name}, at most {day.value_high:.4g}; at "
                f"least {least:.4g} is wanted, {why}"
            )
            found.append(
                Check(
                    "value", day.name, day.value, least, True, text, day.value_low, day.value_high
                )
            )
    return found


def _reward_drift(plan: MonitorPlan, found: MonitorAccumulator, notes: list[str]) -> list[Check]:
    """Drift within the log by the tests of `evaluation.drift`."""
    statistics = found.rewards
    assert statistics is not None and statistics.time is not None, "callers have good rows"
    value = TimedValue(TermMean(0, 1), statistics)
    delta = plan.config.alpha / _FAMILIES
    over_time = OverTime.of(statistics.time, TimeOptions(), 1.0 - delta, [value])
    result: TimeResult = over_time.result(value, {}, {})
    series = result.logging
    if series is None:
        notes.append(f"drift of rewards was not tested: {result.reason}")
        return []
    first, last = series.extremes
    before, after = series.values[first], series.values[last]
    change = abs(after - before) / abs(before) if before else float(after != before)
    most = plan.config.max_reward_drift
    breached = series.drifts and change > most
    return [Check("reward_drift", "", change, most, breached, result.change(series))]
