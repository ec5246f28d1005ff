"""Render evaluations as HTML."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import torch

import offtower
from offtower.atomic import write_text
from offtower.evaluation.report import plots
from offtower.evaluation.report.answer import answer_of
from offtower.evaluation.run import LogEvaluation
from offtower.evaluation.selection import SelectionComparison
from offtower.jsonable import finite


def write_report(
    path: Path, evaluations: Sequence[LogEvaluation], *, title: str, command: str
) -> Path:
    """Write the report, and the same numbers as JSON beside it (`report.json`).

    Args:
        path: HTML file; replaced as a whole.
        evaluations: one section each.
        title: of the page.
        command: that made it, shown so that it can be repeated.
    """
    html = render_page(
        "report.html.j2",
        title=title,
        command=command,
        sections=[_section(evaluation) for evaluation in evaluations],
    )
    write_text(path, html)
    content = {"title": title, "logs": [evaluation.to_dict() for evaluation in evaluations]}
    write_text(path.with_suffix(".json"), json.dumps(finite(content), indent=2) + "\n")
    return path


def render_page(template: str, **content: Any) -> str:
    """Render a template of this package; `versions` is added to its content."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("offtower.evaluation.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    environment.filters["root"] = lambda square: math.sqrt(square) if square >= 0 else None
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["count"] = lambda value: f"{value:,.0f}"
    versions = (
        f"offtower {offtower.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    return environment.get_template(template).render(versions=versions, **content)


def number(value: float | None, digits: int = 4) -> str:
    """A value for a table, in fixed digits; with an exponent only where it is very large."""
    if value is None or value != value:
        return "–"
    if abs(value) < 1e6:
        return f"{value:.{digits}f}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def _digits(scale: float) -> int:
    """Decimals that leave three to four figures of numbers of this size."""
    return 4 if scale == 0 else min(9, max(2, 3 - math.floor(math.log10(abs(scale)))))


def _section(evaluation: LogEvaluation) -> dict[str, Any]:
    from markupsafe import Markup

    result = evaluation.result

    def drawn(chart: Callable[..., str]) -> Markup:
        # Made by matplotlib from escaped text: the one place where markup is not escaped.
        return Markup(plots.both(partial(chart, evaluation)))

    calibrated = any(p.calibration is not None for p in result.policies.values())
    return {
        "evaluation": evaluation,
        "result": result,
        "answer": answer_of(evaluation),
        "digits": _digits(result.logging.estimate.value),
        "charts": {
            "answer": drawn(plots.answer),
            "over_time": drawn(plots.over_time) if result.time and result.time.periods else None,
            "estimates": drawn(plots.estimates),
            "learning": drawn(plots.learning_curves) if any(evaluation.curves.values()) else None,
            "weights": drawn(plots.weights),
            "calibration": drawn(plots.calibration) if calibrated else None,
        },
        "rankings": {
            name: Markup(plots.both(partial(plots.ranking, found, name)))
            for name, found in evaluation.selection.items()
        },
        "ranks": {name: _ranks(found) for name, found in evaluation.selection.items()},
        "truth_columns": list(next(iter(evaluation.truth.values()), {})),
    }


def _ranks(found: SelectionComparison, shown: int = 8) -> list[dict[str, Any]]:
    """The recommended selector's best candidates, and their rank by each selector."""
    best = found.results[found.recommended]
    rows: list[dict[str, Any]] = []
    others = {
        method: {score.name: i + 1 for i, score in enumerate(result.ranking)}
        for method, result in found.results.items()
    }
    names = [score.name for score in best.ranking[:shown]]
    names += [r.best.name for r in found.results.values() if r.best.name not in names]
    scores = {score.name: score for result in found.results.values() for score in result.ranking}
    scores |= {score.name: score for score in best.ranking}
    for name in dict.fromkeys(names):
        rows.append(
            {
                "name": name,
                "value": scores[name].value,
                "ranks": [rank.get(name) for rank in others.values()],
            }
        )
    return rows
