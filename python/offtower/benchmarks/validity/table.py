"""The table of a validity benchmark, and its pooled rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from offtower.benchmarks.validity.measure import METHODS

Result = dict[str, Any]
HEAD = ("cell", "logs", "estimator", "coverage", "width", "false go", "power", "abstention")
LEGEND = """Coverage of a value by gamma, normal and, for independent rows and means, bernstein
intervals (which know the largest weight that can occur). Median width over that of the normal
interval: of a value by gamma and by bernstein; of a difference to the logging policy by gamma.
False go, power: verdicts by gamma and normal intervals on policies of the logging policy's
value, and of 1.1 times that or as much as the world allows. Abstention: gamma intervals of a
difference that are of no useful width. In parentheses standard errors, in the third decimal."""


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Rates over all logs of all cells by estimator and method, and the least coverage."""
    pooled: dict[str, Any] = {}
    for estimator, method in _kinds(results):
        lines = [
            (result["cell"], line)
            for result in results
            for line in result["lines"]
            if (line["estimator"], line["method"]) == (estimator, method)
        ]
        least = min(lines, key=lambda one: float(one[1]["coverage"][0]))
        found: dict[str, Any] = {
            "logs": sum(line["logs"] for _, line in lines),
            "least_coverage": least[1]["coverage"],
            "least_coverage_in": least[0],
            "cells_below_.93": sum(line["coverage"][0] < 0.93 for _, line in lines),
        }
        decided = [line for _, line in lines if "false_go" in line]
        for rate in ("false_go", "power", "below", "above", "abstention"):
            if decided:
                found[rate] = _pooled(decided, rate)
        pooled[f"{estimator} {method}"] = found
    return {"pooled": pooled}


def table(results: Sequence[Result], summary: dict[str, Any]) -> str:
    """Markdown: one row per cell and estimator, the methods side by side in each entry."""
    lines = [
        LEGEND,
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
    ]
    for result in results:
        estimators = dict.fromkeys(line["estimator"] for line in result["lines"])
        for estimator in estimators:
            of = {
                line["method"]: line for line in result["lines"] if line["estimator"] == estimator
            }
            new, old = of[METHODS[0]], of[METHODS[1]]
            bounded = of.get(METHODS[2])
            values = [new, old] if bounded is None else [new, old, bounded]
            widths = _ratio(new["width_ratio"])
            if bounded is not None:
                widths += f", {_ratio(bounded['width_ratio'])}"
            entries = [
                result["cell"],
                f"{new['logs']:,}",
                estimator,
                ", ".join(_rate(one["coverage"]) for one in values),
                f"{widths}; {_ratio(new['difference_width_ratio'])}",
                *(f"{_rate(new[key])}, {_rate(old[key])}" for key in ("false_go", "power")),
                _rate(new["abstention"]),
            ]
            lines.append("| " + " | ".join(entries) + " |")
    lines += ["", "Pooled over the cells:", ""]
    heads = ("estimator", "logs", "least coverage", "cells below .93", "false go", "power")
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, found in summary["pooled"].items():
        entries = [
            name,
            f"{found['logs']:,}",
            f"{_rate(found['least_coverage'])} in {found['least_coverage_in']}",
            str(found["cells_below_.93"]),
            _rate(found["false_go"]) if "false_go" in found else "",
            _rate(found["power"]) if "power" in found else "",
        ]
        lines.append("| " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def in_words(pooled: dict[str, Any]) -> str:
    """One line about an estimator and a method, pooled over the cells."""
    parts = [f"coverage at least {pooled['least_coverage'][0]:.2f} ({pooled['least_coverage_in']})"]
    names = {"false_go": "false go", "power": "power", "abstention": "abstention"}
    parts += [f"{text} {pooled[key][0]:.3f}" for key, text in names.items() if key in pooled]
    return ", ".join(parts)


def _kinds(results: Sequence[Result]) -> list[tuple[str, str]]:
    every = [(line["estimator"], line["method"]) for r in results for line in r["lines"]]
    return list(dict.fromkeys(every))


def _pooled(lines: Sequence[dict[str, Any]], rate: str) -> tuple[float, float]:
    logs = sum(line["logs"] for line in lines)
    mean = sum(line["logs"] * line[rate][0] for line in lines) / logs
    error = math.sqrt(sum((line["logs"] * line[rate][1]) ** 2 for line in lines)) / logs
    return mean, error


def _rate(found: Sequence[float]) -> str:
    return f"{found[0]:.3f} ({1000 * found[1]:.0f})".replace("0.", ".", 1)


def _ratio(quantiles: Sequence[float] | None) -> str:
    return "-" if quantiles is None else f"{quantiles[1]:.2f}"
