"""Monitor a served log: one pass, then checks against the thresholds of the section `monitor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from offtower.config import Config
from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_float_array
from offtower.data.location import AnyPath, Location
from offtower.data.log import ParquetLog
from offtower.data.manifest import read_manifest
from offtower.data.profile import LogProfile
from offtower.data.rows import row_weights
from offtower.errors import DataError
from offtower.evaluation.evaluator import served_logs
from offtower.evaluation.run_loading import EvaluatedPolicy, open_run, with_overrides
from offtower.evaluation.scoring.clock import LogClock
from offtower.evaluation.scoring.policy import PolicyScorer
from offtower.execution import LOCAL, Execution
from offtower.monitoring.accumulator import MonitorAccumulator, MonitorPlan
from offtower.monitoring.checks import Reference, make_checks
from offtower.monitoring.result import MonitorReport
from offtower.prepare import catalogue_schema, log_schema, training_profile
from offtower.run_directory import RunDirectory


def monitor_run(
    path: Path,
    log: AnyPath,
    *,
    reference: AnyPath | None = None,
    overrides: Sequence[str] = (),
    execution: Execution = LOCAL,
) -> MonitorReport:
    """Compare a served log with the run that served it, in one pass and bounded memory.

    Args:
        path: run directory.
        log: ingested log with propensities and timestamps.
        reference: log to compare features and rewards with; by default the training log, whose
            distributions the run holds.
        overrides: changes of the section `monitor`, such as "monitor.alpha=0.001".

    Raises:
        RunError: the run is missing or not finished.
        ConfigError: an override is wrong.
        DataError: the log cannot be read, lacks a feature of the policy, propensities, timestamps
            or a good row, or has row weights.
    """
    directory = RunDirectory(path)
    directory.check_finished()
    config = with_overrides(directory.load_config(), overrides, "monitor")
    opened = open_log(log, config)
    _check_schema(opened, log)
    catalogue = Catalogue.open(
        config.data.catalogue, catalogue_schema(config), log_schema=opened.schema
    )
    run = open_run(path, catalogue)
    _check_features(opened, run.policy.context_encoding.columns, log, path)
    served = EvaluatedPolicy(run, config.serving)
    own = served_logs(served)
    clock = LogClock.of(opened)
    assert clock is not None, "the log has timestamps"
    scorer = PolicyScorer(run.policy, run.items, serving=config.serving, served_logs=own)
    softer = None
    if config.serving.mode == "sample":
        twice = replace(config.serving, temperature=2.0 * config.serving.temperature)
        softer = scorer.served_as(twice)
    plan = MonitorPlan(
        config.monitor,
        opened.schema,
        opened.num_rows,
        clock,
        catalogue,
        scorer,
        own,
        softer,
    )
    compared = _reference(path, reference, plan, config)
    found = _pass(plan, opened, execution)
    if not found.days:
        raise DataError(
            f"the log at '{log}' has no good row: {found.bad:,} break its schema, and "
            f"{found.unknown_rows:,} show items that the catalogue at '{config.data.catalogue}' "
            f"lacks{_examples(found)}. Check that the log and the run belong together"
        )
    checks = make_checks(plan, found, compared)
    return MonitorReport(
        str(path),
        str(log),
        found.rows,
        checks.units,
        config.monitor.alpha,
        checks.checks,
        checks.days,
        checks.notes,
    )


def _pass(plan: MonitorPlan, log: ParquetLog, execution: Execution) -> MonitorAccumulator:
    found, progress = MonitorAccumulator(plan), execution.progress
    progress.start("monitoring", log.num_rows)
    for group, table in enumerate(log.tables()):
        found.add(table, log.location(group), int(log.first_rows[group]))
        progress.advance(table.num_rows)
    progress.finish()
    return found


def open_log(path: AnyPath, config: Config) -> ParquetLog:
    """The log with its own schema, which has the positions and rounds of what was served."""
    place = Location.of(path)
    has_schema = place.exists() and read_manifest(place) is not None
    return ParquetLog.open(place, None if has_schema else log_schema(config))


def _check_schema(log: ParquetLog, path: AnyPath) -> None:
    schema = log.schema
    for name, column, why in (
        ("pscore", schema.pscore, "whose calibration is checked"),
        ("timestamp", schema.timestamp, "by which its days are known"),
    ):
        if column is None:
            what = "propensities" if name == "pscore" else "timestamps"
            raise DataError(
                f"the log at '{path}' has no {what} (schema key '{name}'), {why}. "
                "'offtower serve --log' and 'offtower search --sample --log' write both: join and "
                "ingest what they wrote"
            )
    if schema.weight is not None:
        raise DataError(
            f"the log at '{path}' has row weights (column '{schema.weight}'): monitor the whole "
            "log, not a down-sampled one"
        )


def _check_features(log: ParquetLog, needed: Sequence[str], path: AnyPath, run: Path) -> None:
    missing = [name for name in needed if name not in log.schema.columns]
    if missing:
        raise DataError(
            f"the log at '{path}' has another schema than the run '{run}' was trained with: it "
            f"lacks {', '.join(repr(name) for name in missing)}, which the policy reads; it has "
            f"{', '.join(log.schema.columns)}. Monitor a log that this run served, or name its run"
        )


def _reference(run: Path, log: AnyPath | None, plan: MonitorPlan, config: Config) -> Reference:
    """What the log is compared with: that of the training, or of another log."""
    if log is None:
        stored = training_profile(run)
        if stored is not None:
            return Reference(*stored, f"the training log of '{run}'")
        log = config.data.train
    try:
        opened = open_log(log, config)
        _check_features(opened, plan.scorer.context_encoding.columns, log, run)
    except DataError as error:
        raise DataError(
            f"the run '{run}' holds no distributions of its training log (it was trained by an "
            f"earlier version), and the log cannot be read: {error}. Name one with --reference"
            if str(log) == str(config.data.train)
            else f"--reference: {error}"
        ) from error
    total, mass, schema = 0.0, 0.0, opened.schema

    def watched() -> Iterator[pa.Table]:
        nonlocal total, mass
        for table in opened.tables():
            reward = as_float_array(table.column(schema.reward))
            weight = row_weights(table, schema)
            weight = np.ones_like(reward) if weight is None else weight
            total, mass = total + float(weight @ reward), mass + float(weight.sum())
            yield table

    profile = LogProfile.of(plan.scorer.context_encoding.specs, watched(), schema)
    return Reference(profile, total / mass, f"'{log}'")


def _examples(found: MonitorAccumulator) -> str:
    shown = [*found.unknown_examples, *found.examples]
    return f" (such as {shown[0]})" if shown else ""
