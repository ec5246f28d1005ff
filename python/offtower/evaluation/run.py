"""Evaluate trained runs on a held-out log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from offtower.config import Config
from offtower.data.catalogue import Catalogue
from offtower.data.ledger import LogLedger
from offtower.data.location import AnyPath, Location
from offtower.data.log import ParquetLog
from offtower.errors import ConfigError, DataError
from offtower.evaluation.accumulators import HISTOGRAM_EDGES
from offtower.evaluation.baselines import baseline_values
from offtower.evaluation.decision.coverage import ItemCoverage, coverage_notes
from offtower.evaluation.decision.gate import best_exit_code
from offtower.evaluation.decision.pscore_calibration import PscoreCalibration
from offtower.evaluation.evaluator import EvaluationPlan, Evaluator
from offtower.evaluation.held_out import not_held_out, with_copied_rows
from offtower.evaluation.looks import CountedLook, LookRequest, evaluation_identity, identity
from offtower.evaluation.notes import (
    estimator_notes,
    interaction_notes,
    reward_notes,
    unknown_notes,
)
from offtower.evaluation.result import EstimatorResult, EvaluationResult
from offtower.evaluation.run_loading import OpenRun, open_run, with_overrides
from offtower.evaluation.run_notes import serving_notes, training_notes
from offtower.evaluation.scoring.clock import check_times
from offtower.evaluation.selection import SelectionComparison
from offtower.evaluation.selection_data import check_selection
from offtower.execution import LOCAL, Execution
from offtower.metrics import read_metrics
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import catalogue_schema, log_schema
from offtower.run_directory import RunDirectory

__all__ = ["HISTOGRAM_EDGES", "LogEvaluation", "Truth", "evaluate_runs"]

Truth = Callable[[TwoTowerPolicy, ItemFeatures], dict[str, float]]
"""A simulator's true values of a policy, for reports only."""


@dataclass
class LogEvaluation:
    """An evaluation of policies on one log, with what a report shows beside it."""

    title: str
    result: EvaluationResult
    log: dict[str, Any]
    """Path, rows, items, fingerprint, identity of the content, catalogue, reward."""
    objectives: dict[str, str]
    histograms: dict[str, list[int]]
    """By policy, rows by bin of HISTOGRAM_EDGES."""
    curves: dict[str, list[dict[str, Any]]]
    """By policy, the epoch lines of its metrics."""
    truth: dict[str, dict[str, float]] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    """Other known values to compare with, such as the optimum."""
    notes: list[str] = field(default_factory=list)
    selection: dict[str, SelectionComparison] = field(default_factory=dict)
    """By policy, the choice of an estimator, where requested."""
    coverage: dict[str, ItemCoverage] = field(default_factory=dict)
    """By policy, the share of items that the log never shows."""
    pscore_calibration: PscoreCalibration | None = None
    retrieval: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By policy, retrieval quality of its export at each k, where requested."""
    unknown_values: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """By policy and feature, rows with a context value that training did not see."""
    serving: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By policy, how it is served."""
    also: tuple[str, ...] = ()
    """Names of the policies that no run serves; the verdict of the whole leaves them out."""
    runs: dict[str, str] = field(default_factory=dict)
    """By policy, the directory of its run, where it has one."""
    baseline_values: dict[str, EstimatorResult] = field(default_factory=dict)
    """By baseline policy, its estimated value on the log."""

    @property
    def exit_code(self) -> int:
        """That of the best verdict on a policy that is served."""
        served = self.result.policies.items()
        return best_exit_code([one.verdict for name, one in served if name not in self.also])

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "log": self.log,
            "objectives": self.objectives,
            "truth": self.truth,
            "baselines": self.baselines,
            "notes": self.notes,
            "selection": {name: found.to_dict() for name, found in self.selection.items()},
            "coverage": {name: one.to_dict() for name, one in self.coverage.items()},
            "pscore_calibration": (
                None if self.pscore_calibration is None else self.pscore_calibration.to_dict()
            ),
            "retrieval": self.retrieval,
            "unknown_values": self.unknown_values,
            "serving": self.serving,
            "also": list(self.also),
            "runs": self.runs,
            "baseline_values": {name: one.to_dict() for name, one in self.baseline_values.items()},
            **self.result.to_dict(),
            "exit_code": self.exit_code,
        }


def evaluate_runs(
    paths: Sequence[Path],
    *,
    log: AnyPath | None = None,
    overrides: Sequence[str] = (),
    trust_code: Collection[str] = (),
    select: str | None = None,
    also: Sequence[str] = (),
    fresh: str | None = None,
    title: str | None = None,
    execution: Execution = LOCAL,
    truth: Truth | None = None,
    baselines: dict[str, float] | None = None,
) -> LogEvaluation:
    """Evaluate one or more runs on the same held-out log, paired with each other.

    The log is streamed; only sums are kept. The log's ledger records this look at it, and verdicts
    are corrected for the earlier ones (`evaluation.looks`). Estimators that need a reward model use
    one that the runs' configuration names, fitted on their training log; they are left out, with a
    note, where there is none.

    Args:
        paths: run directories.
        log: directory of the log, or its address; data.test of the first run without it.
        overrides: changes of the section `evaluation`, such as "evaluation.confidence=0.9".
        trust_code: import paths "package.module:Class" of code that the runs may name, besides
            offtower's towers and scikit-learn's estimators. What `overrides` name may run.
        select: also choose an estimator for each policy, by one selector ("paired", "pasif",
            "heuristic", "ocv", "slope") or by "all" of them, compared. Keeps a few numbers a row in
            memory, for logs of up to evaluation.selection.max_rows rows.
        also: further ways to serve each run's policy, evaluated beside the way in which it is
            served: 'greedy', or changes of the section serving such as 'temperature=0.5'.
        fresh: declares that a new question begins, which earlier looks at the log do not count in,
            and says why.
        title: of the report's section.
        execution: embeds the items, fits reward models and evaluates the log; every number has the
            same bits with any mapper. Estimators are selected in this process.
        truth: a simulator's truth, shown beside the estimates.
        baselines: other known values to compare with.

    Raises:
        RunError: a run is missing or not finished.
        UntrustedCodeError: a run names other code.
        ConfigError: no log to evaluate on, or the runs have different catalogues.
        DataError: the log has no propensities, or cannot be read.
    """
    config = with_overrides(RunDirectory(paths[0]).load_config(trust_code=trust_code), overrides)
    opened, place = _open_log(paths[0], log, config)
    check_selection(select, opened, config.evaluation.selection)
    catalogue = Catalogue.open(
        config.data.catalogue, catalogue_schema(config), log_schema=opened.schema
    )
    runs = tuple(open_run(path, catalogue, trust_code) for path in paths)
    data = replace(config.data, test=str(place))
    config = replace(config, data=data)
    evaluator = Evaluator(runs, opened, catalogue, config, tuple(also))
    plan = evaluator.plan(select, execution.progress, execution.mapper)
    look, policies = _look(evaluator, plan, place, fresh), evaluator.policies
    found = evaluate_plan(evaluator, plan, title or str(place), execution, look)
    served = {name: one.run for name, one in policies.items() if one.also is None}
    return replace(
        found,
        objectives={name: one.run.config.objective.name for name, one in policies.items()},
        curves={name: _curve(run) for name, run in served.items()},
        truth={
            name: truth(run.policy, run.items) for name, run in served.items() if truth is not None
        },
        baselines=dict(baselines or {}),
        notes=[*training_notes(evaluator), *found.notes, *serving_notes(policies, found.result)],
        serving={name: asdict(one.serving) for name, one in policies.items()},
        also=tuple(name for name, one in policies.items() if one.also is not None),
        runs={name: str(run.directory.path) for name, run in served.items()},
    )


def _look(
    evaluator: Evaluator,
    plan: EvaluationPlan,
    place: Location,
    fresh: str | None,
) -> CountedLook:
    """The look of runs' policies at a log."""
    log, ledger = evaluator.log, LogLedger(place)
    options = evaluator.config.evaluation
    how = evaluation_identity(plan.options, options, log, evaluator.catalogue)
    also = ledger.earlier_contents(log.content)
    entries = ledger.entries(log.content.fingerprint, *also)
    request = LookRequest(
        log.content.fingerprint,
        {
            name: identity(one.run.policy_digest, asdict(one.serving), how)
            for name, one in evaluator.policies.items()
        },
        options.confidence,
        not_held_out(evaluator.policies, log.content, entries, place),
        fresh,
        log.content,
    )
    return CountedLook(ledger, request)


def evaluate_plan(
    evaluator: Evaluator,
    plan: EvaluationPlan,
    title: str,
    execution: Execution,
    look: CountedLook,
) -> LogEvaluation:
    """Evaluate by a plan. Its policies have neither objective nor learning curve yet."""
    looks, place = look.plan(), str(evaluator.config.data.test)
    confidences = tuple(looks.confidences[name] for name in plan.scorer.policies)
    plan = replace(plan, options=replace(plan.options, verdict_confidences=confidences))
    result, accumulated = evaluator.run(plan, execution)
    # Copied rows are found by the pass; the look has spent its error by then.
    withheld = with_copied_rows(looks.withheld, evaluator.policies, accumulated.sketch, place)
    looks = replace(looks, withheld=withheld)
    result = look.finish(looks, result)
    coverage = accumulated.coverage.coverage()
    calibration = accumulated.coverage.calibration()
    refusal = plan.behavior.refusal(accumulated.behavior)
    values, missing = baseline_values(accumulated.baselines.merged())
    log, names = evaluator.log, list(result.policies)
    return LogEvaluation(
        title=title,
        result=result,
        log={
            "path": str(evaluator.config.data.test),
            "rows": log.num_rows,
            "items": evaluator.catalogue.num_items,
            "fingerprint": log.fingerprint,
            "content": log.content.fingerprint,
            "catalogue": str(evaluator.config.data.catalogue),
            "reward": log.schema.reward,
        },
        objectives=dict.fromkeys(names, ""),
        histograms={name: counts.tolist() for name, counts in accumulated.histograms.items()},
        curves={name: [] for name in names},
        notes=[
            *looks.looks.notes,
            *plan.notes,
            *coverage_notes(coverage, calibration),
            *reward_notes(result),
            *estimator_notes(result, plan.options.estimators),
            *interaction_notes(accumulated.interactions),
            *unknown_notes(accumulated.unknown),
            *([] if refusal is None else [refusal]),
            *missing,
        ],
        selection=evaluator.select(plan, result.policies, accumulated, execution.progress),
        coverage=coverage,
        pscore_calibration=calibration,
        baseline_values=values,
        unknown_values={
            name: one.to_dict() for name, one in accumulated.unknown.items() if one.unknown
        },
    )


def check_log(
    paths: Sequence[Path],
    log: AnyPath | None = None,
    overrides: Sequence[str] = (),
    trust_code: Collection[str] = (),
) -> None:
    """Check the runs' policies and the log, reading no row and starting nothing.

    Raises:
        RunError, ConfigError, DataError: those of `evaluate_runs`.
    """
    for path in paths:
        run = RunDirectory(path)
        run.load_config(trust_code=trust_code)
        run.check_finished()
    config = with_overrides(RunDirectory(paths[0]).load_config(trust_code=trust_code), overrides)
    _open_log(paths[0], log, config)


def _open_log(run: Path, log: AnyPath | None, config: Config) -> tuple[ParquetLog, Location]:
    place = log or config.data.test
    if place is None:
        raise ConfigError(
            f"the configuration of '{run}' names no data.test; pass the log to evaluate on with "
            "--log"
        )
    place = Location.of(place)
    opened = ParquetLog.open(place, log_schema(config))
    if opened.schema.pscore is None and config.evaluation.propensities != "estimate":
        raise DataError(
            f"the log at '{place}' has no propensities: off-policy evaluation needs the column "
            "'pscore' in its schema. Without it, set evaluation.propensities=estimate to estimate "
            "them (catalogues of up to 5,000 items); every output then says so"
        )
    check_times(config.evaluation.time, has_times=opened.schema.timestamp is not None)
    return opened, place


def _curve(run: OpenRun) -> list[dict[str, Any]]:
    path = run.directory.metrics_path
    if not path.exists():
        return []
    wanted = run.directory.manifest().get("metrics_lines", 0)
    lines = read_metrics(path, wanted if isinstance(wanted, int) else 0)
    return [line for line in lines if line["kind"] == "epoch"]
