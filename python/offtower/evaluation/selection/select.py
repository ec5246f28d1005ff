"""Public entry points of estimator selection: run one selector, or compare several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from offtower.errors import OfftowerError
from offtower.evaluation.rows import Array
from offtower.evaluation.selection.heuristic import select_heuristic
from offtower.evaluation.selection.log import SelectionLog
from offtower.evaluation.selection.ocv import select_ocv
from offtower.evaluation.selection.paired import select_paired
from offtower.evaluation.selection.pasif import select_pasif
from offtower.evaluation.selection.problem import Candidate, check_candidates
from offtower.evaluation.selection.result import SelectionComparison, SelectionResult
from offtower.evaluation.selection.slope import select_slope

METHODS: dict[str, Callable[..., SelectionResult]] = {
    "paired": select_paired,
    "pasif": select_pasif,
    "heuristic": select_heuristic,
    "ocv": select_ocv,
    "slope": select_slope,
}
RECOMMENDED = ("paired", "pasif", "ocv", "slope", "heuristic")
"""The first of these that ran is recommended."""
_ROUNDING = 1e-12
"""Share of values and influences within which two values are equal."""
_SEEDED = {"pasif", "heuristic", "ocv"}

_CAVEATS = {
    "paired": "it adds each estimator's own variance and its paired distance from a consistent "
    "estimator, on all rows",
    "pasif": "it measures errors on parts of the log that imitate this policy, with fewer rows "
    "than the log has: an estimator that needs many rows looks worse there",
    "heuristic": "it measures errors between the logging policies and ignores this one: trust it "
    "least where this policy is further from the log than they are from each other",
    "ocv": "it compares with a noisy consistent estimate on held-out rows: an estimator of low "
    "variance with a bias below that noise looks good",
    "slope": "it takes the estimator of least variance whose interval meets those of the others: a "
    "bias within the intervals is not counted",
}


def select_estimator(
    log: SelectionLog,
    candidates: Iterable[Candidate],
    *,
    method: str = "paired",
    seed: int = 0,
    **options: Any,
) -> SelectionResult:
    """Rank estimators for this log and this target policy.

    method: of METHODS. options: of the method's own function (`select_pasif` and its like). The
    same seed gives the same result.
    Raises OfftowerError for an unknown method, candidates that are no candidates, or a log that
    lacks what the method needs.
    """
    if method not in METHODS:
        raise OfftowerError(
            f"unknown selection method {method!r}; use one of {', '.join(METHODS)} "
            "(compare_selectors runs them all)."
        )
    checked = check_candidates(candidates, log.problem.models)
    if method in _SEEDED:
        options = {"seed": seed, **options}
    return METHODS[method](log, checked, **options)


def compare_selectors(
    log: SelectionLog,
    candidates: Iterable[Candidate],
    *,
    methods: Iterable[str] | None = None,
    seed: int = 0,
    options: dict[str, dict[str, Any]] | None = None,
    logs: Mapping[str, SelectionLog] | None = None,
) -> SelectionComparison:
    """Run several selectors, recommend one, and explain where they disagree.

    methods: names of METHODS, all by default; a method that cannot run on this log is listed with
    its reason. options: per method. logs: a log of its own for a method, such as a part of the rows
    for which there are draws. Raises OfftowerError when no method ran.
    """
    checked = check_candidates(candidates, log.problem.models)
    results: dict[str, SelectionResult] = {}
    failed: dict[str, str] = {}
    for method in METHODS if methods is None else methods:
        try:
            results[method] = select_estimator(
                (logs or {}).get(method, log),
                checked,
                method=method,
                seed=seed,
                **(options or {}).get(method, {}),
            )
        except OfftowerError as error:
            if method not in METHODS:
                raise
            failed[method] = str(error)
    recommended = next((method for method in RECOMMENDED if method in results), None)
    if recommended is None:
        raise OfftowerError(
            "no selection method could run: " + "; ".join(f"{m}: {e}" for m, e in failed.items())
        )
    distance, spread = _spread(log, checked, results, recommended)
    return SelectionComparison(
        results,
        failed,
        recommended,
        _agreement(results),
        spread,
        _verdict(results, recommended, distance, spread),
        _disagreements(results, recommended),
    )


def _agreement(results: dict[str, SelectionResult]) -> dict[tuple[str, str], float]:
    """Spearman correlation of each two rankings over the candidates that both contain."""
    names = list(results)
    out: dict[tuple[str, str], float] = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            first = [s.name for s in results[a].ranking]
            second = [s.name for s in results[b].ranking]
            shared = [x for x in first if x in second]
            if len(shared) < 2:
                out[a, b] = float("nan")
                continue
            left = np.arange(len(shared), dtype=np.float64)
            right = np.argsort(np.argsort([second.index(x) for x in shared])).astype(np.float64)
            out[a, b] = float(np.corrcoef(left, right)[0, 1])
    return out


def _spread(
    log: SelectionLog,
    candidates: list[Candidate],
    results: dict[str, SelectionResult],
    recommended: str,
) -> tuple[float, float]:
    """Largest distance of another method's choice from the recommended one, on the whole log.

    In standard errors of the recommended choice, and in those of the paired difference of the two.
    """
    names = [results[recommended].best.name]
    names += [result.best.name for result in results.values()]
    by_name = {candidate.name: candidate for candidate in candidates}
    values, influence = log.problem.influence([by_name[name] for name in dict.fromkeys(names)])
    gap = np.abs(values - values[0])
    # A difference of rounding is none, whatever its standard error.
    gap[gap <= _ROUNDING * (np.abs(values).max() + np.abs(influence).max())] = 0.0
    own = np.sqrt(np.mean(influence[0] ** 2) / log.problem.n)
    paired = np.sqrt(np.mean((influence - influence[0]) ** 2, axis=1) / log.problem.n)
    return _largest_ratio(gap, np.full_like(gap, own)), _largest_ratio(gap, paired)


def _largest_ratio(gap: Array, error: Array) -> float:
    """Of gaps to errors, where the gap is not 0."""
    some = gap > 0.0
    if not some.any():
        return 0.0
    if np.any(error[some] <= 0.0):
        return float("inf")
    return float((gap[some] / error[some]).max())


def _verdict(
    results: dict[str, SelectionResult], recommended: str, distance: float, spread: float
) -> str:
    choices = {name: result.best.name for name, result in results.items()}
    chosen = choices[recommended]
    others = {name: choice for name, choice in choices.items() if choice != chosen}
    if not others:
        return f"All selectors that ran choose {chosen}."
    listed = ", ".join(f"{name} chooses {choice}" for name, choice in others.items())
    listed = f"{listed}; {recommended} chooses {chosen}."
    if distance <= 1.0:
        return (
            f"{listed} Their values lie within one standard error of each other: the choice hardly "
            "matters."
        )
    text = f"{listed} Their values differ by {spread:.1f} standard errors of the difference"
    if spread <= 2.0:
        return f"{text}: noise explains that; report both."
    return (
        f"{text}, more than noise explains: at least one choice is biased for this policy. Look at "
        "the weights and the reward model's calibration before trusting either."
    )


def _disagreements(results: dict[str, SelectionResult], recommended: str) -> dict[str, str]:
    """By method that chooses another estimator than the recommended one, the reason."""
    chosen = results[recommended].best.name
    out = {}
    for method, result in results.items():
        if result.best.name == chosen:
            continue
        ranked = [score.name for score in result.ranking]
        if chosen not in ranked:
            where = f"it could not rank {chosen}"
        elif chosen in result.tied:
            where = f"its evidence does not separate {chosen} from its choice"
        else:
            where = f"it ranks {chosen} at {ranked.index(chosen) + 1} of {len(ranked)}"
        out[method] = f"chooses {result.best.name}; {where}. Note that {_CAVEATS[method]}."
    return out
