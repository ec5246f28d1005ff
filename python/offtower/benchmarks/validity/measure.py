"""What each interval method and the verdicts by it do on the logs of one cell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from offtower.benchmarks.validity.worlds import Cell, World
from offtower.evaluation.decision.gate import GO, NOT_ENOUGH, decide
from offtower.evaluation.drift import qualify
from offtower.evaluation.estimates import Estimates
from offtower.evaluation.estimators import make_estimator, of_loggers
from offtower.evaluation.intervals.methods import DEFAULT_METHOD
from offtower.evaluation.options import EvaluationOptions
from offtower.evaluation.result import Gap
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.sums import EvaluationSums

ESTIMATORS = ("ips", "snips", "dr", "reg_ips", "reg_dr")
LOGGER_WEIGHTED = ("logger_weighted_ips", "logger_weighted_dr")
"""Further estimators of logs of several behavior policies."""
METHODS = (DEFAULT_METHOD, "normal", "bernstein")
"""The default, and those that stood before it; bernstein has no verdict of its own."""
WIDTHS = (0.25, 0.5, 0.75)
"""Quantiles over the logs of an interval's width over the normal one's."""

Series = defaultdict[tuple[str, str, str], list[float]]
"""Numbers by log, of (estimator, method, what)."""


def measure(cell: Cell, logs: int, seed: int) -> list[dict[str, Any]]:
    """One line per estimator and method, over logs of the cell's world.

    coverage: of the policy "value". below, above: shares of null logs whose interval of the
    difference lies above or below the truth. false_go, power: shares of go of "null" and "better".
    abstention: of null logs whose interval is of no useful width. Each with its standard error.
    """
    world, found = World.of(cell), Series(list)
    for rows in world.logs(logs, seed):
        for policy in ("value", "null", "better"):
            _policy(world, policy, rows[policy], found)
    return [
        {"estimator": estimator, "method": method, **_summary(found, estimator, method)}
        for estimator in estimators(cell)
        for method in METHODS
        if (estimator, method, "covered") in found
    ]


def estimators(cell: Cell) -> tuple[str, ...]:
    """Names of the estimators that the cell's rows have a form for."""
    return ESTIMATORS + (LOGGER_WEIGHTED if cell.loggers > 1 else ())


def _policy(world: World, policy: str, rows: EvaluationRows, found: Series) -> None:
    options = EvaluationOptions(
        tuple(
            of_loggers(make_estimator(name), world.cell.loggers) for name in estimators(world.cell)
        ),
        world.reward_range,
        intervals=METHODS if policy == "value" and not world.cell.users else METHODS[:2],
        max_weight=world.largest_weight(policy) if policy == "value" else None,
    )
    sums = EvaluationSums.of({policy: rows}, options)
    if policy == "value":
        _value(world, sums, found)
        return
    truth = world.value(policy) - world.logging_value
    default = Estimates(_by(sums, DEFAULT_METHOD))
    # Without times, the intervals of both methods are made from the same terms.
    normal = default if sums.terms.time is None else Estimates(_by(sums, "normal"))
    evidence = default.evidence(0, default.estimate(0, 0))  # The diagnostics of every verdict.
    for i, estimator in enumerate(estimators(world.cell)):
        for method, finisher in (DEFAULT_METHOD, default), ("normal", normal):
            gap = _gap(finisher, i, method)
            verdict = decide(
                replace(
                    evidence,
                    difference=gap.estimate,
                    interval=gap.simultaneous,
                    estimator=estimator,
                    rounding=gap.rounding,
                )
            )
            # Time qualifies nothing where there is not enough evidence.
            timed = finisher.time is not None and verdict.decision != NOT_ENOUGH
            over_time = finisher.over_time([0], i) if timed else None
            if over_time is not None:
                verdict = qualify(verdict, over_time, policy, 0.0)
            key = estimator, method
            found[*key, policy].append(verdict.decision == GO)
            if policy == "null":
                interval = gap.interval
                found[*key, "below"].append(interval.low > truth)
                found[*key, "above"].append(interval.high < truth)
                found[*key, "abstained"].append(interval.rows_needed is not None)
                found[*key, "width of the difference"].append(interval.high - interval.low)


def _gap(finisher: Estimates, index: int, method: str) -> Gap:
    """The difference to the logging policy, with intervals of one method."""
    terms, joint = finisher.paired(0, index), finisher.joint[0]
    gap = finisher.gap(*terms, joint)
    if method != finisher.method:
        gap = replace(
            gap,
            interval=finisher.interval(method, terms, finisher.options.confidence),
            simultaneous=finisher.interval(method, terms, joint),
        )
    return gap.within(finisher.difference_range)


def _by(sums: EvaluationSums, method: str) -> EvaluationSums:
    """Sums for one method; those that stood before the default one took no account of time."""
    sums = replace(sums, options=replace(sums.options, intervals=(method,), max_weight=None))
    return sums if method == DEFAULT_METHOD else _without_time(sums)


def _without_time(sums: EvaluationSums) -> EvaluationSums:
    return replace(sums, terms=replace(sums.terms, time=None), timed_weights=None)


def _value(world: World, sums: EvaluationSums, found: Series) -> None:
    truth = world.value("value")
    # Only bernstein may use the declared largest weight.
    default = Estimates(_by(sums, DEFAULT_METHOD))
    options = replace(sums.options, intervals=sums.options.intervals[1:])
    others = Estimates(replace(_without_time(sums), options=options))
    for i, estimator in enumerate(estimators(world.cell)):
        terms = default.own(0, i)[1:]
        plain = terms if default.time is None else others.own(0, i)[1:]
        intervals = {
            **default.intervals(sums.options.estimators[i], *terms),
            **others.intervals(sums.options.estimators[i], *plain),
        }
        if world.cell.target == "future":
            assert default.time is not None
            forecast = default.time.forecast(default.timed(0, i).value)
            assert forecast is not None
            intervals[DEFAULT_METHOD] = forecast.interval
        for method, interval in intervals.items():
            found[estimator, method, "covered"].append(interval.low <= truth <= interval.high)
            found[estimator, method, "width"].append(interval.high - interval.low)


def _summary(found: Series, estimator: str, method: str) -> dict[str, Any]:
    def of(what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array(found[estimator, method, what], dtype=np.float64)

    def against_normal(what: str) -> list[float] | None:
        normal = np.array(found[estimator, "normal", what])
        kept = normal > 0.0
        if not kept.any():
            return None
        return [float(x) for x in np.quantile(of(what)[kept] / normal[kept], WIDTHS)]

    line: dict[str, Any] = {
        "logs": len(of("covered")),
        "coverage": share(of("covered")),
        "width_ratio": against_normal("width"),
        "no_normal_width": float(np.mean(np.array(found[estimator, "normal", "width"]) == 0.0)),
    }
    if (estimator, method, "null") in found:
        line |= {
            "false_go": share(of("null")),
            "power": share(of("better")),
            "below": share(of("below")),
            "above": share(of("above")),
            "abstention": share(of("abstained")),
            "difference_width_ratio": against_normal("width of the difference"),
        }
    return line


def share(hits: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """A share and its standard error; that of one more hit and one more miss at the ends."""
    return _share(float(hits.sum()), len(hits))


def _share(hits: float, n: int) -> tuple[float, float]:
    mean = hits / n
    kept = mean if 0.0 < mean < 1.0 else (hits + 1.0) / (n + 2.0)
    return mean, math.sqrt(kept * (1.0 - kept) / n)


RATES = ("coverage", "false_go", "power", "below", "above", "abstention")


def pool(rounds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The lines of several rounds of logs as one; quantiles of widths are averaged over rounds."""
    return [_pooled(lines) for lines in zip(*rounds, strict=True)]


def _pooled(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    logs = [line["logs"] for line in lines]
    total = sum(logs)
    found = {**lines[0], "logs": total}
    for key in RATES:
        if key in found:
            hits = sum(n * line[key][0] for n, line in zip(logs, lines, strict=True))
            found[key] = _share(float(round(hits)), total)
    for key in ("width_ratio", "difference_width_ratio"):
        known = [(n, line[key]) for n, line in zip(logs, lines, strict=True) if line.get(key)]
        if known:
            weight = [n for n, _ in known]
            found[key] = np.average([one for _, one in known], axis=0, weights=weight).tolist()
    found["no_normal_width"] = float(
        np.average([line["no_normal_width"] for line in lines], weights=logs)
    )
    return found
