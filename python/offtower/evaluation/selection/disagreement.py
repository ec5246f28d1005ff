"""Where selectors disagree, and what that means."""

from __future__ import annotations

from offtower.evaluation.selection.result import SelectionResult

_MEANING = {
    "paired": "it adds each estimator's own variance and its paired distance from a consistent "
    "one, on all rows",
    "pasif": "it measures errors on parts of the log that imitate this policy, with fewer rows "
    "than the log has: an estimator that needs many rows looks worse there",
    "heuristic": "it measures errors between the logging policies and never looks at this one: "
    "trust it least where this policy is further from the log than they are from each other",
    "ocv": "it compares with a noisy consistent estimate on held-out rows: a steady estimator "
    "with a bias below that noise looks good",
    "slope": "it takes the steadiest estimator whose interval meets those of the others: a bias "
    "that the intervals hide is not counted",
}


def explain(results: dict[str, SelectionResult], recommended: str) -> dict[str, str]:
    """By method that chooses another estimator than the recommended one: what lies behind it."""
    chosen = results[recommended].best.name
    out = {}
    for method, result in results.items():
        if result.best.name == chosen:
            continue
        ranked = [score.name for score in result.ranking]
        if chosen not in ranked:
            where = f"it could not judge {chosen}"
        elif chosen in result.tied:
            where = f"it cannot tell {chosen} from its choice"
        else:
            where = f"it ranks {chosen} {_ordinal(ranked.index(chosen) + 1)} of {len(ranked)}"
        out[method] = f"chooses {result.best.name}; {where}. Remember that {_MEANING[method]}."
    return out


def _ordinal(number: int) -> str:
    ending = (
        "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    )
    return f"{number}{ending}"
