"""Results of estimator selection."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from offtower.evaluation.rows import Array
from offtower.evaluation.selection.problem import Candidate


@dataclass(frozen=True)
class CandidateScore:
    """One candidate of a ranking.

    value: its estimate of the target policy's value. mse: its estimated mean squared error (NaN
    for a selector that ranks without one; it can be slightly negative, as a noisy variance is
    subtracted).
    noise: standard error of `mse` as far as the selector's own repetitions show it.
    margin, margin_noise: mse less the winner's, paired, and that difference's standard error.
    """

    name: str
    value: float
    mse: float
    noise: float
    margin: float
    margin_noise: float

    @property
    def distinguishable(self) -> bool:
        """Whether the winner's lead over this candidate exceeds two standard errors."""
        return self.margin > 2.0 * self.margin_noise


@dataclass(frozen=True)
class SelectionResult:
    """A ranking of the candidates, best first.

    method: the selector. ranking: scores, best first. skipped: candidates that the selector could
    not rank, with the reason. details: its settings. notes: warnings for the reader.
    """

    method: str
    ranking: tuple[CandidateScore, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> CandidateScore:
        """The chosen candidate."""
        return self.ranking[0]

    @property
    def tied(self) -> tuple[str, ...]:
        """Candidates within two standard errors of the best."""
        return tuple(s.name for s in self.ranking[1:] if not s.distinguishable)

    def position(self, name: str) -> int:
        """Position of a candidate in the ranking, from 0; KeyError where it was not ranked."""
        for position, score in enumerate(self.ranking):
            if score.name == name:
                return position
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; a NaN becomes None."""
        return {
            "method": self.method,
            "best": self.best.name,
            "tied_with_best": list(self.tied),
            "ranking": [
                {k: _json_number(v) for k, v in asdict(score).items()} for score in self.ranking
            ],
            "skipped": dict(self.skipped),
            "details": dict(self.details),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class SelectionComparison:
    """Several selectors on one problem.

    results: by method, in the order they ran. failed: method -> why it could not run. recommended:
    a method. agreement: pairs of methods -> Spearman correlation of their
    rankings over the candidates that both ranked. spread: largest difference between the value of
    another method's choice and the recommended one's, in standard errors of their paired
    difference. verdict: one plain sentence.
    disagreements: by method that chooses another estimator, the reason.
    """

    results: dict[str, SelectionResult]
    failed: dict[str, str]
    recommended: str
    agreement: dict[tuple[str, str], float]
    spread: float
    verdict: str
    disagreements: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> CandidateScore:
        """The recommended method's choice."""
        return self.results[self.recommended].best

    @property
    def remarks(self) -> list[tuple[str, str]]:
        """(method, sentence): its notes, and the candidates that it could not rank."""
        remarks = []
        for method, result in self.results.items():
            remarks += [(method, note) for note in result.notes]
            for reason in dict.fromkeys(result.skipped.values()):
                names = [name for name, why in result.skipped.items() if why == reason]
                remarks.append(
                    (method, f"could not rank {len(names)} candidates ({names[0]}, ...): {reason}")
                )
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "recommended": self.recommended,
            "best": self.best.name,
            "choices": {name: result.best.name for name, result in self.results.items()},
            "verdict": self.verdict,
            "disagreements": dict(self.disagreements),
            "spread_in_standard_errors": _json_number(self.spread),
            "agreement": {f"{a} | {b}": _json_number(v) for (a, b), v in self.agreement.items()},
            "results": {name: result.to_dict() for name, result in self.results.items()},
            "failed": dict(self.failed),
        }


def make_result(
    method: str,
    candidates: list[Candidate],
    values: Array,
    mse: Array,
    noise: Array,
    margin_noise: Array,
    *,
    order: list[int] | None = None,
    skipped: dict[str, str] | None = None,
    details: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
) -> SelectionResult:
    """Scores in ranking order; by default increasing mse, ties in the candidates' order."""
    if order is None:
        order = [int(j) for j in np.argsort(mse, kind="stable")]
    best = order[0]
    ranking = tuple(
        CandidateScore(
            name=candidates[j].name,
            value=float(values[j]),
            mse=float(mse[j]),
            noise=float(noise[j]),
            margin=float(mse[j] - mse[best]),
            margin_noise=float(margin_noise[j]),
        )
        for j in order
    )
    return SelectionResult(method, ranking, skipped or {}, details or {}, notes)


def _json_number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
