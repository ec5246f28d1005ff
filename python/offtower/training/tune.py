"""Random search of objective and settings by off-policy lower bounds on a validation log.

Every trial is a run that can be resumed, evaluated and exported. Trials are independent, so they
may run in parallel. Those with low bounds are stopped early (`training.halving`).

A policy is a function of the training log, its trial and its epoch. Bounds are corrected for all
trials and all validations that they could have had (Bonferroni), so they hold at once for every
policy among which the search can choose, and so for the one that it chooses, whichever trials it
stops.
Source: Bergstra and Bengio 2012, "Random search for hyper-parameter optimization".
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from offtower.atomic import write_text
from offtower.checksums import read_checked_json, write_checked_json
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
from offtower.errors import ConfigError, RunError, StoppedError
from offtower.evaluation.intervals import simultaneous_confidence
from offtower.execution import LOCAL, Execution
from offtower.imports import code_paths
from offtower.interruption import EpochLimit
from offtower.jsonable import finite
from offtower.mapping import Mapper
from offtower.metrics import read_metrics
from offtower.prepare import log_schema
from offtower.run_directory import RunDirectory
from offtower.seeds import derive_seed
from offtower.training.halving import Rung, best, rungs
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
class Search:
    """What is searched, and how.

    Attributes:
        space: dotted keys of the configuration and the values to try.
        trials: runs to train.
        reduction_factor: one in so many trials is trained further at each rung, and the others are
            stopped; 1 trains all to the end.
    """

    space: Mapping[str, Sequence[Any]] = field(default_factory=lambda: DEFAULT_SPACE)
    trials: int = 20
    reduction_factor: int = 3

    def __post_init__(self) -> None:
        if self.trials < 1 or self.reduction_factor < 1:
            raise ConfigError(
                "a search needs at least one trial and a reduction factor of at least 1, got "
                f"{self.trials} and {self.reduction_factor}"
            )


@dataclass(frozen=True)
class Trial:
    """One run of the search."""

    number: int
    overrides: Overrides
    low: float | None
    """Lower bound of its value on the validation log, with the confidence corrected for all trials
    and validations; None if the run failed."""
    error: str | None = None
    epochs: int = 0
    """Epochs that it was trained for."""
    stopped: bool = False
    """Whether it was stopped early: `low` is then a bound for its best epoch so far, and says
    nothing of what it would have become."""


@dataclass(frozen=True)
class TuneResult:
    """All trials, best first, then those that were stopped and those that failed; what `offtower
    tune` prints.

    Attributes:
        epochs: that all trials together would be trained for without a stop.
    """

    trials: list[Trial]
    folder: Path
    epochs: int

    @property
    def best(self) -> Trial:
        """The trial with the highest lower bound among those that were not stopped; a stopped one
        only where all that continued have failed."""
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
    search: Search | None = None,
    *,
    resume: bool = False,
    take_over: bool = False,
    execution: Execution = LOCAL,
    say: Callable[[str], None] = lambda text: None,
) -> TuneResult:
    """Train runs, stop those with low bounds early, and rank the others by their lower bounds.

    Each trial selects its epoch by the lower bound of the configured estimator on the validation
    log. Bounds hold simultaneously for all trials and validations (Bonferroni).

    Args:
        config: the base configuration; its data has a validation log with propensities.
        search: space, number of trials, and how many go on; by default `Search()`.
        resume: keep what trials have learned and continue them, to the same choice.
        take_over: as `resume`, even where another process runs the same search; that one stops.
        execution: runs the trials; the workers of its mapper share the storage.

    Returns:
        Trials, best first; runs/<name>-tune/ holds trials.json and best.yaml.

    Raises:
        ConfigError: no validation log, or a key of the space is unknown.
        RunError: every trial failed, one has run before and `resume` is false, or the search was
            begun with another number of trials or another reduction factor.
        LeaseError: another process runs the same search, or took it over.
    """
    search = search or Search()
    if config.data.validation is None:
        raise ConfigError(
            "tune needs a held-out log to choose by: name one as data.validation "
            "('offtower ingest' and 'offtower simulate' write one)"
        )
    if config.objective.name == "auto" and "objective" not in search.space:
        raise ConfigError("tune varies one objective's settings: name it as objective.name")
    points = list(enumerate(draw_trials(search.space, search.trials, config.seed)))
    confidence = simultaneous_confidence(config.evaluation.confidence, len(points))
    configs = [trial_config(config, number, overrides, confidence) for number, overrides in points]
    for one in configs:
        _check(one, resume=resume or take_over)
    mapper = execution.mapper
    reports = LOCAL if mapper.distributed else Execution(progress=execution.progress)
    folder = Path(config.runs) / f"{config.name}-tune"
    plan = rungs([one.training for one in configs], search.reduction_factor)
    run = _TrialRun(config, confidence, take_over, reports, _device(mapper), plan[0])
    trials: dict[int, Trial] = {}
    with Lease.acquire(folder, take_over=take_over, remedy=_REMEDY) as lease:
        # What is stopped early has been compared on the log, too.
        _record(config, folder, configs)
        _keep_factor(folder, search.reduction_factor, resume=resume or take_over)
        going = points
        for number, rung in enumerate(plan):
            going = [going[k] for k in best([_low(trials, n) for n, _ in going], rung.trials)]
            stage = "" if len(plan) == 1 else f", rung {number + 1} of {len(plan)}"
            found = mapper.map(
                replace(run, rung=rung), going, f"tune{stage}", on_lost=run.of_lost_worker
            )
            for done, trial in enumerate(found, start=1):
                trials[trial.number] = trial
                say(f"trial {done} of {len(going)}{stage}: {_outcome(trial)}")
        ranked = sorted(trials.values(), key=_rank)
        if ranked[0].low is None:
            raise RunError(f"every trial failed; the first said: {ranked[0].error}")
        lease.check()
        content = json.dumps(finite([asdict(trial) for trial in ranked]), indent=1)
        write_text(folder / "trials.json", content)
        chosen = configs[ranked[0].number]
        chosen.name, chosen.evaluation.confidence = config.name, config.evaluation.confidence
        write_text(folder / "best.yaml", to_yaml(chosen))
    return TuneResult(ranked, folder, sum(one.training.epochs for one in configs))


def _check(config: Config, *, resume: bool) -> None:
    """Check that a trial can begin, or continue under the same correction of its bounds.

    Raises:
        RunError: it cannot.
    """
    run = RunDirectory(config.run_directory)
    run.check(config, resume=resume)
    if not run.config_path.exists():
        return
    # The fingerprint of a run leaves its evaluation out.
    stored = run.load_config(trust_code=code_paths(to_dict(config))).evaluation.confidence
    if stored != config.evaluation.confidence:
        raise RunError(
            f"'{run.path}' was begun in a search with another number of trials or another "
            f"evaluation.confidence: its bounds hold at {stored:.6g}, and this search needs "
            f"{config.evaluation.confidence:.6g}. Resume with the same --trials, or choose another "
            "name (--set name=...)"
        )


def _keep_factor(folder: Path, factor: int, *, resume: bool) -> None:
    """Store the reduction factor of a search, or compare it with that of the search so far.

    Raises:
        RunError: another factor would stop other trials.
    """
    path = folder / "search.json"
    if resume and path.exists():
        stored = read_checked_json(path)["reduction_factor"]
        if stored != factor:
            raise RunError(
                f"the search in '{folder}' was begun with a reduction factor of {stored}, and this "
                f"one has {factor}: it would stop other trials. Resume with --reduction-factor "
                f"{stored}, or choose another name (--set name=...)"
            )
    write_checked_json(path, {"reduction_factor": factor})


def _device(mapper: Mapper) -> str | None:
    """The device of trials on workers, which have the GPUs that their tasks ask for."""
    if not mapper.distributed:
        return None
    return "cuda" if mapper.gpus else "cpu"


def _low(trials: Mapping[int, Trial], number: int) -> float | None:
    """Lower bound of a trial so far; 0 where it has not begun, and None where it failed."""
    return trials[number].low if number in trials else 0.0


def _rank(trial: Trial) -> tuple[bool, bool, int, float, int]:
    """Sorts trials: the best one first, then those that were stopped last, failed ones at the end.

    Of two rungs, the trials of the later one had larger bounds at the end of the earlier.
    """
    stopped_at = -trial.epochs if trial.stopped else 0
    return trial.low is None, trial.stopped, stopped_at, -_number(trial.low), trial.number


def _outcome(trial: Trial) -> str:
    if trial.low is None:
        return f"failed  {_short(trial.overrides)}"
    so_far = f" after {trial.epochs} epochs" if trial.stopped else ""
    return f"at least {trial.low:.4f}{so_far}  {_short(trial.overrides)}"


@dataclass(frozen=True)
class _TrialRun:
    """Trains a trial to the end of a rung, from its newest checkpoint."""

    config: Config
    confidence: float
    take_over: bool
    execution: Execution
    device: str | None
    rung: Rung

    def __call__(self, point: tuple[int, Overrides]) -> Trial:
        number, overrides = point
        one = trial_config(self.config, number, overrides, self.confidence)
        if self.device is not None:
            one.training.device = self.device
        limit = self.rung.epochs(one.training)
        try:
            trial = _trained(one, point, limit)
            if trial is None:
                self._train(one, limit)
                trial = _trained(one, point, limit)
        except RunError as error:
            # A diverged trial is a result, and the others continue.
            return Trial(number, overrides, None, str(error))
        if trial is None:
            lost = f"'{one.run_directory}' has lost lines of metrics.jsonl; remove that folder"
            return Trial(number, overrides, None, lost)
        return trial

    def _train(self, config: Config, epochs: int) -> None:
        whole = epochs == config.training.epochs
        interruption = self.execution.interruption if whole else EpochLimit(epochs)
        with contextlib.suppress(StoppedError):
            train_run(
                config,
                resume=True,
                take_over=self.take_over,
                execution=replace(self.execution, interruption=interruption),
            )

    @staticmethod
    def of_lost_worker(point: tuple[int, Overrides], error: Exception) -> Trial:
        """The trial whose workers die again and again, usually for a lack of memory."""
        return Trial(*point, None, str(error))


def _trained(config: Config, point: tuple[int, Overrides], epochs: int) -> Trial | None:
    """The trial as it was after `epochs`, even if it went on; None if it has not come so far."""
    run = RunDirectory(config.run_directory)
    ended = run.manifest_path.exists() and (run.policy / "policy.json").exists()
    lines: list[dict[str, Any]] = []
    if run.metrics_path.exists():
        lines = [line for line in read_metrics(run.metrics_path) if line["kind"] == "epoch"]
        lines = [{"validation": None, **line} for line in lines]
    reached = max((line["epoch"] + 1 for line in lines), default=0)
    scores = [line["validation"] for line in lines if line["epoch"] < epochs]
    scores = [score for score in scores if score is not None]
    if ended and (reached <= epochs or not scores):
        manifest = run.manifest()
        return Trial(*point, manifest.get("validation_lower_bound"), epochs=manifest["epochs"])
    if reached < epochs or epochs == config.training.epochs or not scores:
        return None
    # As `Trainer` keeps the best epoch. Infinite numbers are null in the file.
    kept = max(scores, key=lambda score: _number(score["low"]))
    return Trial(*point, _number(kept["simultaneous_low"]), epochs=epochs, stopped=True)


def _number(low: float | None) -> float:
    return -float("inf") if low is None else low


def _record(config: Config, folder: Path, trials: Sequence[Config]) -> None:
    """Record in the validation log's ledger that settings were chosen on it."""
    assert config.data.validation is not None, "checked before"
    log = ParquetLog.open(config.data.validation, log_schema(config))
    settings = sorted({settings_fingerprint(trial) for trial in trials})
    facts = {"search": str(folder), "settings": settings}
    record(config.data.validation, log.content.fingerprint, "tuned", facts)


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
