"""Random search of objective and settings by off-policy lower bounds on a validation log.

Every trial is a run that can be resumed, evaluated and exported. Trials are independent, so they
may run in parallel.
Source: Bergstra and Bengio 2012, "Random search for hyper-parameter optimization".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from offtower.atomic import write_text
from offtower.config import (
    Config,
    apply_overrides,
    parse_config,
    read_yaml,
    settings_fingerprint,
    to_dict,
    to_yaml,
)
from offtower.data.lease import Lease
from offtower.data.ledger import record
from offtower.data.log import ParquetLog
from offtower.errors import ConfigError, RunError
from offtower.evaluation.intervals import simultaneous_confidence
from offtower.execution import LOCAL, Execution
from offtower.jsonable import finite
from offtower.prepare import log_schema
from offtower.run_directory import RunDirectory
from offtower.seeds import derive_seed
from offtower.training.run import train_run

Overrides = dict[str, Any]
"""Dotted keys of the configuration, and their values."""

DEFAULT_SPACE: Mapping[str, Sequence[Any]] = {
    "objective": [
        {"name": "regression"},
        {"name": "weighted_likelihood"},
        {"name": "weighted_likelihood", "arguments": {"smoothing": 0.5}},
        {"name": "clipped_ips", "arguments": {"max_weight": 10.0}},
        {"name": "clipped_dr", "arguments": {"max_weight": 10.0}},
    ],
    "policy.temperature": [1.0, 0.25, 0.0625],
    "training.learning_rate": [1e-3, 3e-3, 1e-2],
    "training.weight_decay": [0.01, 0.1],
    "training.decay": ["linear"],
}
"""The default space. Objectives that require a reward model get a factored one."""


_REMEDY = ". --take-over runs the search in its place; the other process then stops"


@dataclass(frozen=True)
class Trial:
    """One run of the search."""

    number: int
    overrides: Overrides
    low: float | None
    """Lower bound of its value on the validation log, with the confidence corrected for all trials;
    None if the run failed."""
    error: str | None = None


@dataclass(frozen=True)
class TuneResult:
    """All trials, best first; what `offtower tune` prints."""

    trials: list[Trial]
    folder: Path

    @property
    def best(self) -> Trial:
        """The trial with the highest lower bound."""
        return self.trials[0]


def load_space(path: Path) -> dict[str, list[Any]]:
    """A YAML file of dotted keys and lists of values.

    Raises:
        ConfigError: the file is missing, or a key has no list.
    """
    content = read_yaml(path, "space")
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"'{path}' must hold dotted keys, each with a list of values")
    for key, values in content.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"'{path}': '{key}' needs a list of values, but has {values!r}")
    return content


def draw_trials(space: Mapping[str, Sequence[Any]], count: int, seed: int) -> Iterator[Overrides]:
    """Draw `count` distinct points of the space, or all of them; a function of the seed."""
    points = list(product(*space.values()))
    order = np.random.default_rng(derive_seed(seed, "tune")).permutation(len(points))
    for index in order[:count]:
        yield dict(zip(space, points[index], strict=True))


def trial_config(config: Config, number: int, overrides: Overrides, confidence: float) -> Config:
    """The run of one trial.

    Raises:
        ConfigError: the overrides do not fit the configuration.
    """
    content = to_dict(config)
    text = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    content = apply_overrides(content, text)
    content["name"] = f"{config.name}-tune-{number:03d}"
    content["evaluation"]["confidence"] = confidence
    if content["reward_model"]["kind"] == "none" and _needs_model(content["objective"]["name"]):
        content["reward_model"]["kind"] = "factored"
    return parse_config(content, source=f"trial {number}")


def tune(
    config: Config,
    *,
    space: Mapping[str, Sequence[Any]] = DEFAULT_SPACE,
    count: int = 20,
    resume: bool = False,
    take_over: bool = False,
    execution: Execution = LOCAL,
    say: Callable[[str], None] = lambda text: None,
) -> TuneResult:
    """Train `count` runs and rank them by their lower bounds.

    Each trial stops and selects its epoch by the lower bound of the configured estimator on the
    validation log. Bounds hold simultaneously for all trials (Bonferroni).

    Args:
        config: the base configuration; its data has a validation log with propensities.
        space: dotted keys and the values to try.
        count: trials.
        resume: keep finished trials and continue stopped ones.
        take_over: as `resume`, even where another process runs the same search; that one stops.
        execution: runs the trials; the workers of its mapper share the storage.

    Returns:
        Trials, best first; runs/<name>-tune/ holds trials.json and best.yaml.

    Raises:
        ConfigError: no validation log, or a key of the space is unknown.
        RunError: every trial failed, or one has run before and `resume` is false.
        LeaseError: another process runs the same search, or took it over.
    """
    if config.data.validation is None:
        raise ConfigError(
            "tune needs a held-out log to choose by: name one as data.validation "
            "('offtower ingest' and 'offtower simulate' write one)"
        )
    if config.objective.name == "auto" and "objective" not in space:
        raise ConfigError("tune varies one objective's settings: name it as objective.name")
    points = list(enumerate(draw_trials(space, count, config.seed)))
    confidence = simultaneous_confidence(config.evaluation.confidence, len(points))
    for number, overrides in points:
        one = trial_config(config, number, overrides, confidence)
        RunDirectory(one.run_directory).check(one, resume=resume or take_over)
    mapper = execution.mapper
    reports = LOCAL if mapper.distributed else Execution(progress=execution.progress)
    run = _TrialRun(config, confidence, take_over, reports)
    folder = Path(config.runs) / f"{config.name}-tune"
    found: list[Trial] = []
    with Lease.acquire(folder, take_over=take_over, remedy=_REMEDY) as lease:
        for trial in mapper.map(run, points, "tune"):
            found.append(trial)
            bound = "failed" if trial.low is None else f"at least {trial.low:.4f}"
            say(f"trial {len(found)} of {len(points)}: {bound}  {_short(trial.overrides)}")
        ranked = sorted(found, key=lambda t: -np.inf if t.low is None else t.low, reverse=True)
        if ranked[0].low is None:
            raise RunError(f"every trial failed; the first said: {found[0].error}")
        lease.check()
        trials = json.dumps(finite([asdict(trial) for trial in ranked]), indent=1)
        write_text(folder / "trials.json", trials)
        best = trial_config(config, ranked[0].number, ranked[0].overrides, confidence)
        best.name, best.evaluation.confidence = config.name, config.evaluation.confidence
        write_text(folder / "best.yaml", to_yaml(best))
        _record(config, folder, [trial_config(config, n, o, confidence) for n, o in points])
    return TuneResult(ranked, folder)


@dataclass(frozen=True)
class _TrialRun:
    """Trains a trial, from its newest checkpoint if its worker was lost."""

    config: Config
    confidence: float
    take_over: bool
    execution: Execution

    def __call__(self, point: tuple[int, Overrides]) -> Trial:
        number, overrides = point
        one = trial_config(self.config, number, overrides, self.confidence)
        try:
            low = _finished(one)
            if low is None:
                low = train_run(
                    one,
                    resume=True,
                    take_over=self.take_over,
                    execution=self.execution,
                ).validation
        except RunError as error:
            # A diverged trial is a result, and the others continue.
            return Trial(number, overrides, None, str(error))
        return Trial(number, overrides, low)


def _record(config: Config, folder: Path, trials: Sequence[Config]) -> None:
    """Record in the validation log's ledger that settings were chosen on it."""
    assert config.data.validation is not None, "checked before"
    log = ParquetLog.open(config.data.validation, log_schema(config))
    settings = sorted({settings_fingerprint(trial) for trial in trials})
    facts = {"search": str(folder), "settings": settings}
    record(config.data.validation, log.content.fingerprint, "tuned", facts)


def _finished(config: Config) -> float | None:
    """The lower bound of a trial that already finished."""
    run = RunDirectory(config.run_directory)
    if not run.manifest_path.exists() or not (run.policy / "policy.json").exists():
        return None
    low: float | None = run.manifest().get("validation_lower_bound")
    return low


def _needs_model(objective: str) -> bool:
    from offtower.objectives import OBJECTIVES

    kind = OBJECTIVES.get(objective)
    return kind is not None and kind.requirements.reward_model


def _short(overrides: Overrides) -> str:
    parts = []
    for key, value in overrides.items():
        if isinstance(value, dict):
            inner = [str(value.get("name", ""))]
            inner += [f"{k}={v}" for k, v in (value.get("arguments") or {}).items()]
            parts.append(" ".join(inner).strip())
        else:
            parts.append(f"{key.rsplit('.', 1)[-1]}={value}")
    return ", ".join(parts)
