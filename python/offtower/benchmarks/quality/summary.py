"""Means, standard deviations and paired tests of the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Line = Mapping[str, Any]

WITHIN = 0.01
"""Relative difference to the best candidate's value that counts as choosing the best."""

BELOW = 0.005
"""Share of the range of rewards by which a value may be below the logging policy's."""


def summarize(results: Sequence[Line]) -> dict[str, Any]:
    """Summarize by world: baselines, methods, and the first method against every other one.

    - mean and spread: mean and standard deviation over seeds; start_spread: over training seeds.
    - paired: mean difference of the first method and another over their common seeds, with a
      two-sided t test.
    - picks: how often the choice of auto or tune is within 1 % of its best candidate.

    `safety` counts, over all worlds, how often auto is below the logging policy and how often its
    lower bound exceeds the true value.
    """
    worlds: dict[str, Any] = {}
    for name in dict.fromkeys(line["world"] for line in results):
        lines = [line for line in results if line["world"] == name and "value" in line]
        if lines:
            worlds[name] = _world(lines)
    return {"worlds": worlds, "safety": safety(results)}


def safety(results: Sequence[Line]) -> dict[str, int]:
    """Count how auto compares with the logging policy and with its own lower bound.

    - below: its policy is worth less than the logging policy, by more than .005 of the range.
    - replaced_below: of these, where it did not advise to keep the logging policy.
    - low_exceeds: its lower bound is above the true value.
    """
    counts = dict.fromkeys(("runs", "keep_logging", "below", "replaced_below", "low_exceeds"), 0)
    for line in results:
        facts = line.get("facts", {})
        if "keep_logging" not in facts or "logging" not in line["baselines"]:
            continue
        low, high = facts["reward_range"]
        below = line["value"] < line["baselines"]["logging"] - BELOW * (high - low)
        counts["runs"] += 1
        counts["keep_logging"] += facts["keep_logging"]
        counts["below"] += below
        counts["replaced_below"] += below and not facts["keep_logging"]
        # Rounding of equal numbers is not an excess.
        counts["low_exceeds"] += facts["low"] > line["value"] + 1e-6 * (high - low)
    return counts


def table(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a text table."""
    for name, world in summary["worlds"].items():
        marks = "  ".join(f"{key} {mean:.3f}" for key, mean in world["baselines"].items())
        yield f"\n{name}: {marks}"
        head = f"{'value':>8}{'spread':>8}{'greedy':>8}{'difference':>12}{'p':>8}"
        yield f"  {'method':<24}{head}  seeds"
        for method, found in world["methods"].items():
            pair = world["paired"].get(method)
            against = f"{pair['mean']:+12.4f}{pair['p']:8.1e}" if pair else " " * 20
            yield (
                f"  {method:<24}{found['mean']:8.3f}{found['spread']:8.3f}{found['greedy']:8.3f}"
                f"{against}  {found['seeds']}"
            )
        for method, picks in world["picks"].items():
            yield f"  {method} within 1 % of its best candidate: {picks['within']} of {picks['of']}"
    found = summary["safety"]
    if found["runs"]:
        yield (
            f"\nauto over {found['runs']} runs: keeps the logging policy in "
            f"{found['keep_logging']}; below it by more than {BELOW:g} of the range in "
            f"{found['below']}, of which {found['replaced_below']} without that advice; its lower "
            f"bound exceeds the truth in {found['low_exceeds']}"
        )


def _world(lines: Sequence[Line]) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    by_seed: dict[str, dict[int, float]] = {}
    for name in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == name]
        seeds = sorted({line["seed"] for line in own})
        values = [[line["value"] for line in own if line["seed"] == seed] for seed in seeds]
        by_seed[name] = {s: float(np.mean(v)) for s, v in zip(seeds, values, strict=True)}
        means = list(by_seed[name].values())
        starts = [np.var(v, ddof=1) for v in values if len(v) > 1]
        methods[name] = {
            "mean": float(np.mean(means)),
            "spread": float(np.std(means, ddof=1)) if len(means) > 1 else 0.0,
            "start_spread": float(np.sqrt(np.mean(starts))) if starts else None,
            "greedy": float(np.mean([line["greedy"] for line in own])),
            "seconds": float(np.mean([line["seconds"] for line in own])),
            "seeds": len(seeds),
        }
    first = {line["seed"]: line["baselines"] for line in lines}.values()
    return {
        "baselines": {
            key: float(np.mean([marks[key] for marks in first])) for key in next(iter(first))
        },
        "methods": methods,
        "paired": _paired(by_seed),
        "picks": _picks(lines),
    }


def _paired(by_seed: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Test the first method's values minus every other method's, paired by seed."""
    found: dict[str, Any] = {}
    first = next(iter(by_seed))
    for name, values in by_seed.items():
        both = sorted(set(by_seed[first]) & set(values))
        if name == first or len(both) < 2:
            continue
        difference = np.array([by_seed[first][s] - values[s] for s in both])
        spread = difference.std(ddof=1)
        p = float(stats.ttest_1samp(difference, 0.0).pvalue) if spread > 0 else 1.0
        found[name] = {
            "mean": float(difference.mean()),
            "error": float(spread / np.sqrt(len(both))),
            "p": p,
            "seeds": len(both),
        }
    return found


def _picks(lines: Sequence[Line]) -> dict[str, dict[str, int]]:
    choosing = dict.fromkeys(
        line["method"] for line in lines if any(map(_of_candidate, line.get("facts", {})))
    )
    return {name: _within([x for x in lines if x["method"] == name]) for name in choosing}


def _within(own: Sequence[Line]) -> dict[str, int]:
    best = [max(v for k, v in x["facts"].items() if _of_candidate(k)) for x in own]
    within = sum(x["value"] >= (1 - WITHIN) * one for x, one in zip(own, best, strict=True))
    return {"within": int(within), "of": len(own)}


def _of_candidate(fact: str) -> bool:
    return fact.startswith("value of ")
