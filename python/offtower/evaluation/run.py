"""Judge trained runs on a held-out log: run directories in, an evaluation out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offtower.config import Config, RewardModelConfig, apply_overrides, parse_config, to_dict
from offtower.data.catalogue import Catalogue
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError, DataError
from offtower.evaluation.estimators import Estimator, make_estimator
from offtower.evaluation.evaluate import EvaluationOptions, EvaluationSums
from offtower.evaluation.result import EvaluationResult
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring import PolicyScorer, concatenate
from offtower.evaluation.selection import (
    METHODS,
    SelectionComparison,
    SelectionLog,
    compare_selectors,
    default_candidates,
)
from offtower.metrics import read_metrics
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.reward.dense import DenseRewardModel
from offtower.models.reward.fit import obtain_reward_model, restore_reward_model
from offtower.models.store import load_policy
from offtower.prepare import catalogue_schema, log_schema, open_data
from offtower.progress import Progress
from offtower.run_directory import RunDirectory

Truth = Callable[[TwoTowerPolicy, ItemFeatures], dict[str, float]]
"""A simulator's true values of a policy, for reports; never used to choose anything."""

MAX_SELECTION_ROWS = 2_000_000

HISTOGRAM_EDGES = np.linspace(-4.0, 4.0, 49)
"""Bins of log10 of the importance weight; weights beyond count in the first and last."""


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
            **self.result.to_dict(),
        }


@dataclass
class _Run:
    directory: RunDirectory
    config: Config
    policy: TwoTowerPolicy
    items: ItemFeatures

    @property
    def name(self) -> str:
        return self.directory.path.name


def evaluate_runs(
    paths: Sequence[Path],
    *,
    log: Path | None = None,
    overrides: Sequence[str] = (),
    select: str | None = None,
    title: str | None = None,
    progress: Progress | None = None,
    truth: Truth | None = None,
    landmarks: dict[str, float] | None = None,
) -> LogEvaluation:
    """Judge one or more runs on the same held-out log, paired with each other.

    The log is streamed; what is kept are sums. Estimators that need a reward model use one that
    the runs' configuration names, fitted on their training log; they are left out, with a note,
    where there is none.

    Args:
        paths: run directories.
        log: directory of the log; data.test of the first run without it.
        overrides: changes such as "evaluation.confidence=0.9"; only of the section `evaluation`,
            since the rest says what the run is.
        select: also choose the estimator to believe for each policy, by one selector ("paired",
            "pasif", "heuristic", "ocv", "slope") or by "all" of them, compared. Keeps a few numbers
            a row in memory, so it takes logs of up to MAX_SELECTION_ROWS rows.
        title: of the report's section.
        truth: a simulator's truth, shown beside the estimates.
        landmarks: other known values to show.

    Raises:
        RunError: a run is not there or not finished.
        ConfigError: no log to judge on, or the runs have different catalogues.
        DataError: the log has no propensities, or cannot be read.
    """
    progress = progress or Progress()
    first = RunDirectory(paths[0])
    config = _judged_by(first.load_config(), overrides)
    place = log or (None if config.data.test is None else Path(config.data.test))
    if place is None:
        raise ConfigError(
            f"the configuration of '{paths[0]}' names no data.test; pass --log with the log to "
            "judge on"
        )
    opened = ParquetLog.open(place, log_schema(config))
    if opened.schema.pscore is None:
        raise DataError(
            f"the log at '{place}' has no propensities: off-policy evaluation needs the column "
            "'pscore' in its schema"
        )
    catalogue = Catalogue.open(config.data.catalogue, catalogue_schema(config))
    runs = [_open_run(path, catalogue) for path in paths]
    owner, reward_model = _reward_model(runs, config.evaluation.reward_model, progress)
    notes: list[str] = []
    estimators = _estimators(config, reward_model is not None, notes)
    options = EvaluationOptions(
        estimators=estimators,
        reward_range=opened.schema.reward_range,
        confidence=config.evaluation.confidence,
        intervals=_intervals(config.evaluation.interval),
        decide_by=config.evaluation.decide_by,
        seed=config.seed,
    )
    names = _distinct_names(runs)
    _check_selection(select, opened)
    kept: dict[str, list[EvaluationRows]] = {name: [] for name in names}
    sums: EvaluationSums | None = None
    histograms = {name: np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64) for name in names}
    progress.start("judging", opened.num_rows)
    for by_policy in _scored(runs, names, owner, reward_model, opened, catalogue):
        part = EvaluationSums.of(by_policy, options)
        sums = part if sums is None else sums.merge(part)
        for name, rows in by_policy.items():
            histograms[name] += _histogram(rows)
            if select is not None:
                kept[name].append(rows)
        progress.advance(next(iter(by_policy.values())).n)
    progress.finish()
    assert sums is not None, "a log has at least one row"
    return LogEvaluation(
        title=title or f"{place}",
        result=sums.finish(),
        log={
            "path": str(place),
            "rows": opened.num_rows,
            "items": catalogue.num_items,
            "fingerprint": opened.fingerprint,
        },
        objectives={name: run.config.objective.name for name, run in zip(names, runs, strict=True)},
        histograms={name: counts.tolist() for name, counts in histograms.items()},
        curves={name: _curve(run) for name, run in zip(names, runs, strict=True)},
        truth={
            name: truth(run.policy, run.items)
            for name, run in zip(names, runs, strict=True)
            if truth is not None
        },
        landmarks=dict(landmarks or {}),
        notes=notes,
        selection={
            name: _select(concatenate(parts), select, config.seed)
            for name, parts in kept.items()
            if select is not None
        },
    )


def _check_selection(select: str | None, log: ParquetLog) -> None:
    if select is None:
        return
    if select not in (*METHODS, "all"):
        raise ConfigError(f"--select must be one of {', '.join(METHODS)} or all, got '{select}'")
    if log.num_rows > MAX_SELECTION_ROWS:
        raise ConfigError(
            f"estimator selection takes logs of up to {MAX_SELECTION_ROWS:,} rows, and this one "
            f"has {log.num_rows:,}; pass a part of it with --log (data.split_log cuts one)"
        )


def _select(rows: EvaluationRows, select: str, seed: int) -> SelectionComparison:
    """Which estimator to believe for one policy, among the default candidates tuned by SLOPE."""
    if rows.expected_reward is None:
        log = SelectionLog.from_rows(rows)
    else:
        # The reward model was fitted on the training log, which this one is not.
        log = SelectionLog.from_rows({"model": rows}, independent_models=frozenset({"model"}))
    methods = None if select == "all" else [select]
    return compare_selectors(log, default_candidates(log.problem), methods=methods, seed=seed)


def _judged_by(config: Config, overrides: Sequence[str]) -> Config:
    for override in overrides:
        if not override.startswith("evaluation."):
            raise ConfigError(
                f"override '{override}' would change what the run is; only keys of 'evaluation' "
                "can be changed where it is judged"
            )
    return parse_config(apply_overrides(to_dict(config), overrides), source="--set")


def _open_run(path: Path, catalogue: Catalogue) -> _Run:
    directory = RunDirectory(path)
    config = directory.load_config()
    policy, _ = load_policy(directory.policy)
    items = ItemFeatures.from_catalogue(catalogue, policy.item_encoding)
    return _Run(directory, config, policy, items)


def _reward_model(
    runs: Sequence[_Run], wanted: RewardModelConfig | None, progress: Progress
) -> tuple[_Run | None, RewardModel | None]:
    """The run that owns the reward model, and the model; the first run that names one."""
    for run in sorted(runs, key=lambda r: not r.directory.reward_model.exists()):
        config = wanted or run.config.reward_model
        if config.kind == "none":
            continue
        own = config == run.config.reward_model and run.directory.reward_model.exists()
        if own and config.kind == "factored":
            encodings = (run.policy.context_encoding, run.policy.item_encoding)
            return run, restore_reward_model(
                config, run.directory.reward_model, *encodings, run.items
            )
        # A scikit-learn model cannot be stored without a pickle: it is fitted again, seeded.
        data = open_data(run.config, progress, run.directory.path)
        model = obtain_reward_model(config, data, run.config.seed, progress)
        assert isinstance(model, DenseRewardModel) or config.kind == "factored"
        return run, model
    return None, None


def _scored(
    runs: Sequence[_Run],
    names: Sequence[str],
    owner: _Run | None,
    reward_model: RewardModel | None,
    log: ParquetLog,
    catalogue: Catalogue,
) -> Iterator[dict[str, EvaluationRows]]:
    """The same logged rows, batch by batch, as seen by each policy."""
    scorers = [PolicyScorer(run.policy, run.items) for run in runs]
    # Each run encodes the log by what it was trained with.
    streams = [
        scan(log, catalogue, run.policy.context_encoding, run.config.evaluation.batch_rows)
        for run in runs
    ]
    of_owner = None if owner is None else next(i for i, run in enumerate(runs) if run is owner)
    batches: tuple[EncodedRows, ...]
    for batches in zip(*streams, strict=True):
        reward = None
        if reward_model is not None and of_owner is not None:
            reward = reward_model.for_new_rows(batches[of_owner])
        yield {
            name: scorer.score(batch, reward)
            for name, scorer, batch in zip(names, scorers, batches, strict=True)
        }


def _estimators(config: Config, has_reward_model: bool, notes: list[str]) -> tuple[Estimator, ...]:
    wanted = [make_estimator(name) for name in config.evaluation.estimators]
    kept = [e for e in wanted if has_reward_model or not e.needs_reward_model]
    left_out = [e.label for e in wanted if e not in kept]
    if left_out:
        notes.append(
            f"{', '.join(left_out)} left out: the configuration names no reward model "
            "(reward_model.kind or evaluation.reward_model.kind)"
        )
    if not kept:
        raise ConfigError(
            "every estimator of evaluation.estimators needs a reward model, and the configuration "
            "names none"
        )
    return tuple(kept)


def _intervals(first: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((first, "normal", "bootstrap")))


def _histogram(rows: EvaluationRows) -> np.ndarray:
    log_weight = rows.log_weight
    assert log_weight is not None
    inside = np.clip(log_weight / np.log(10.0), HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    return np.histogram(inside, HISTOGRAM_EDGES)[0]


def _curve(run: _Run) -> list[dict[str, Any]]:
    path = run.directory.metrics_path
    if not path.exists():
        return []
    return [line for line in read_metrics(path) if line["kind"] == "epoch"]


def _distinct_names(runs: Sequence[_Run]) -> list[str]:
    names = [run.name for run in runs]
    if len(set(names)) != len(names):
        names = [str(run.directory.path) for run in runs]
    if len(set(names)) != len(names):
        raise ConfigError(f"a run is named twice: {', '.join(names)}")
    return names
