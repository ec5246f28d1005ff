"""The table of a validity benchmark, and its pooled rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from offtower.benchmarks.validity.measure import METHODS

Result = dict[str, Any]
HEAD = ("cell", "estimator", "coverage", "width", "false go", "power", "no width")


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
    shown = METHODS[:2]
    lines = [
        f"Entries: {', '.join(shown)}; standard errors in parentheses, in the last digit.",
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
            new, old = of[shown[0]], of[shown[1]]
            entries = [
                result["cell"],
                estimator,
                *(f"{_rate(new[key])}, {_rate(old[key])}" for key in ("coverage",)),
                f"{_ratio(new['width_ratio'])}; {_ratio(new['difference_width_ratio'])}",
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
