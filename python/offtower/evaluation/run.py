"""Judge trained runs on a held-out log: run directories in, an evaluation out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offtower.data.catalogue import Catalogue
from offtower.data.location import Location, Place
from offtower.data.log import ParquetLog
from offtower.errors import ConfigError, DataError
from offtower.evaluation.decision.coverage import ItemCoverage, coverage_notes
from offtower.evaluation.decision.propensity import PscoreCalibration
from offtower.evaluation.evaluator import HISTOGRAM_EDGES, Judge
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.run_loading import OpenRun, judged_by, open_run
from offtower.evaluation.selection import SelectionComparison
from offtower.evaluation.selection_buffer import check_selection
from offtower.mapping import Mapper
from offtower.metrics import read_metrics
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import catalogue_schema, log_schema
from offtower.progress import Progress
from offtower.run_directory import RunDirectory

__all__ = ["HISTOGRAM_EDGES", "LogEvaluation", "Truth", "evaluate_runs"]

Truth = Callable[[TwoTowerPolicy, ItemFeatures], dict[str, float]]
"""A simulator's true values of a policy, for reports; never used to choose anything."""


@dataclass
class LogEvaluation:
    """Policies judged on one log, and what a report shows beside."""

    title: str
    result: EvaluationResult
    log: dict[str, Any]
    """Path, rows, items, fingerprint, behaviour policies."""
    objectives: dict[str, str]
    histograms: dict[str, list[int]]
    """By policy, rows by bin of HISTOGRAM_EDGES."""
    curves: dict[str, list[dict[str, Any]]]
    """By policy, the epoch lines of its metrics."""
    truth: dict[str, dict[str, float]] = field(default_factory=dict)
    landmarks: dict[str, float] = field(default_factory=dict)
    """Other known values, such as the optimum."""
    notes: list[str] = field(default_factory=list)
    selection: dict[str, SelectionComparison] = field(default_factory=dict)
    """By policy, which estimator to believe, where that was asked for."""
    coverage: dict[str, ItemCoverage] = field(default_factory=dict)
    """By policy, what it would show that the log never shows."""
    pscore_calibration: PscoreCalibration | None = None
    retrieval: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By policy, what its export retrieves at each k (`retrieval.quality`), where asked for."""

    @property
    def labels(self) -> dict[str, str]:
        """By policy, what to call it: its objective, or its name where two share one."""
        told = list(self.objectives.values())
        return {
            name: objective if told.count(objective) == 1 else f"{name} ({objective})"
            for name, objective in self.objectives.items()
        }

    @property
    def exit_code(self) -> int:
        return self.result.exit_code

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "log": self.log,
            "objectives": self.objectives,
            "truth": self.truth,
            "landmarks": self.landmarks,
            "notes": self.notes,
            "selection": {name: found.to_dict() for name, found in self.selection.items()},
            "coverage": {name: one.to_dict() for name, one in self.coverage.items()},
            "pscore_calibration": (
                None if self.pscore_calibration is None else self.pscore_calibration.to_dict()
            ),
            "retrieval": self.retrieval,
            **self.result.to_dict(),
        }


def evaluate_runs(
    paths: Sequence[Path],
    *,
    log: Place | None = None,
    overrides: Sequence[str] = (),
    trust_code: Collection[str] = (),
    select: str | None = None,
    title: str | None = None,
    progress: Progress | None = None,
    mapper: Mapper | None = None,
    truth: Truth | None = None,
    landmarks: dict[str, float] | None = None,
) -> LogEvaluation:
    """Judge one or more runs on the same held-out log, paired with each other.

    The log is streamed; what is kept are sums. Estimators that need a reward model use one that
    the runs' configuration names, fitted on their training log; they are left out, with a note,
    where there is none.

    Args:
        paths: run directories.
        log: directory of the log, or its address; data.test of the first run without it.
        overrides: changes such as "evaluation.confidence=0.9"; only of the section `evaluation`,
            since the rest says what the run is.
        trust_code: import paths "package.module:Class" of code that the runs may name, besides
            offtower's towers and scikit-learn's estimators. What `overrides` name may run.
        select: also choose the estimator to believe for each policy, by one selector ("paired",
            "pasif", "heuristic", "ocv", "slope") or by "all" of them, compared. Keeps a few numbers
            a row in memory, so it takes logs of up to MAX_SELECTION_ROWS rows.
        title: of the report's section.
        mapper: where the log is judged; every number has the same bits with any. Reward models are
            fitted, and estimators selected, in this process.
        truth: a simulator's truth, shown beside the estimates.
        landmarks: other known values to show.

    Raises:
        RunError: a run is not there or not finished.
        UntrustedCodeError: a run names other code.
        ConfigError: no log to judge on, or the runs have different catalogues.
        DataError: the log has no propensities, or cannot be read.
    """
    progress = progress or Progress()
    config = judged_by(RunDirectory(paths[0]).load_config(trust_code=trust_code), overrides)
    place = log or config.data.test
    if place is None:
        raise ConfigError(
            f"the configuration of '{paths[0]}' names no data.test; pass --log with the log to "
            "judge on"
        )
    place = Location.of(place)
    opened = ParquetLog.open(place, log_schema(config))
    if opened.schema.pscore is None and config.evaluation.propensities == "logged":
        raise DataError(
            f"the log at '{place}' has no propensities: off-policy evaluation needs the column "
            "'pscore' in its schema. Without them, evaluation.propensities=estimate makes do with "
            "estimates (catalogues of up to 5,000 items), and says so everywhere"
        )
    check_selection(select, opened, config.evaluation.selection)
    catalogue = Catalogue.open(config.data.catalogue, catalogue_schema(config))
    runs = [open_run(path, catalogue, trust_code) for path in paths]
    judge = Judge(runs, opened, catalogue, config)
    judge.prepare(select, progress)
    result = judge.judge(mapper or Mapper(), progress)
    if judge.same_log():
        judge.notes.append(
            "this is the log that the policies learned from: every value is optimistic"
        )
    coverage, calibration = judge.gathered.watch.coverage(), judge.gathered.watch.calibration()
    judge.notes += coverage_notes(coverage, calibration)
    refusal = judge.refusal()
    if refusal is not None:
        judge.notes.append(refusal)
    named = list(zip(judge.names, runs, strict=True))
    selection = judge.choose(select, progress)
    return LogEvaluation(
        title=title or f"{place}",
        result=result,
        log={
            "path": str(place),
            "rows": opened.num_rows,
            "items": catalogue.num_items,
            "fingerprint": opened.fingerprint,
        },
        objectives={name: run.config.objective.name for name, run in named},
        histograms={name: counts.tolist() for name, counts in judge.gathered.histograms.items()},
        curves={name: _curve(run) for name, run in named},
        truth={name: truth(run.policy, run.items) for name, run in named if truth is not None},
        landmarks=dict(landmarks or {}),
        notes=judge.notes,
        selection=selection,
        coverage=coverage,
        pscore_calibration=calibration,
    )


def _curve(run: OpenRun) -> list[dict[str, Any]]:
    path = run.directory.metrics_path
    if not path.exists():
        return []
    return [line for line in read_metrics(path) if line["kind"] == "epoch"]
