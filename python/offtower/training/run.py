"""One training run in its directory, from the configuration to the saved policy."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

import offtower
from offtower.ancestry import descent, earlier_folders
from offtower.checksums import is_complete
from offtower.config import Config, config_fingerprint
from offtower.crossfit.reward_model import obtain_reward_model, store_folds
from offtower.data.ledger import record
from offtower.data.log import Log, ParquetLog
from offtower.data.replay import ReplayLog
from offtower.data.row_sketch import RowSketch, sketched_columns
from offtower.errors import ConfigError, RunError
from offtower.evaluation.estimators import make_estimator
from offtower.execution import LOCAL, Execution
from offtower.log_sums import FittingPart
from offtower.metrics import MetricsLog
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.store import policy_digest, save_policy
from offtower.prepare import OpenedData, PreparedData, open_data, trained_rows
from offtower.progress import Progress
from offtower.run_claim import ClaimedRun, claim_run
from offtower.run_directory import RunDirectory
from offtower.tracking import Tracker, make_trackers
from offtower.training.auto import train_auto
from offtower.training.checkpoints import CheckpointStore
from offtower.training.checks import check_run
from offtower.training.device import describe_device, to_configured_device
from offtower.training.setup import build_setup, checked_objective, uses_auto
from offtower.training.trainer import EpochHook, Trainer, TrainingOutputs, TrainingResult
from offtower.training.workers import SINGLE_PROCESS, Workers


def train_run(
    config: Config,
    *,
    resume: bool = False,
    take_over: bool = False,
    mirror: str | None = None,
    execution: Execution = LOCAL,
    hook: Callable[[PreparedData], EpochHook] | None = None,
    workers: Workers = SINGLE_PROCESS,
) -> TrainingResult:
    """Claim the run, train as configured and write runs/<name>/policy.

    Args:
        resume: continue from the newest checkpoint of the same configuration, if there is one.
        take_over: as `resume`, also while another process writes to the run; that one stops.
        mirror: address of the folder of copies (`offtower.mirror`); with `resume` a missing run
            is fetched from there.
        execution, hook, workers: as in `train_claimed`.

    Raises:
        RunError: the directory belongs to another configuration, or exists and `resume` is false.
        LeaseError: another process writes to the run, or took it over.
        ConfigError, DataError: the configuration or the data cannot be used.
    """
    with ExitStack() as held:
        run = ClaimedRun(config.run_directory)

        def claim() -> None:
            nonlocal run
            check_run(config, resume=resume or take_over)
            run = held.enter_context(
                claim_run(config, resume=resume, take_over=take_over, mirror=mirror)
            )

        workers.on_first(claim)
        return train_claimed(
            run,
            config,
            resume=resume or take_over,
            execution=execution,
            hook=hook,
            workers=workers,
        )


def train_claimed(
    run: ClaimedRun,
    config: Config,
    *,
    resume: bool = False,
    execution: Execution = LOCAL,
    hook: Callable[[PreparedData], EpochHook] | None = None,
    workers: Workers = SINGLE_PROCESS,
    trackers: Sequence[Tracker] = (),
) -> TrainingResult:
    """Train a run that has been claimed.

    Args:
        run: the first worker's holds the lease.
        resume: continue from the newest checkpoint, or begin.
        execution: runs the parts of objective=auto; the first worker reports progress.
        hook: builds a function that adds numbers to each epoch's metrics, such as a simulator's
            true value.
        workers: call this together, with the same arguments and shared storage.
        trackers: receive the metrics' lines on every worker, beside the configured ones.

    Raises:
        LeaseError: another process took the run over.
        StoppedError: `execution.interruption` asked to stop; the work is saved.
        RunError, ConfigError, DataError: the run, the configuration or the data is invalid.
    """
    progress = execution.progress if workers.first else LOCAL.progress
    began = time.time()
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    data = _open_data(config, progress, run, workers)
    configured = make_trackers(config, run.path) if workers.first else []
    metrics = MetricsLog(
        run.metrics_path if workers.first else None, [*configured, *trackers], run.check_owner
    )
    each_epoch = None if hook is None or not workers.first else hook(data)
    data = to_configured_device(data, config.training)
    outputs = TrainingOutputs(
        metrics=metrics,
        progress=progress,
        on_epoch_end=each_epoch,
        interruption=execution.interruption,
    )
    if uses_auto(config, data):
        if workers.size > 1:
            raise ConfigError(
                "objective.name=auto cannot train on workers that share batches: pass a mapper to "
                "train_run, as 'offtower train --workers' does"
            )
        automatic = train_auto(config, data, outputs=outputs, run=run, mapper=execution.mapper)
        automatic.store_reward_model(run.auto_reward_model, binary=data.facts.binary_reward)
        facts = {
            "auto": automatic.report,
            "workers": 1,
            "device": describe_device(data.device),
            "metrics_lines": len(metrics.lines),
        }
        _finish(run, config, data, Trained(automatic.policy, automatic.result, began, facts))
        metrics.close()
        return automatic.result
    if execution.mapper.distributed:
        raise ConfigError(
            "the log has no propensities, and without them objective.name=auto is regression: to "
            "train it on workers, name it (--set objective.name=regression)"
        )
    if workers.first and config.objective.name == "auto":
        progress.note(
            "note: the log has no propensities, and without them objective.name=auto is regression "
            "with the schedule of section training"
        )
    reward_model = _reward_model(config, data, run, progress, workers)
    setup = build_setup(config, data, reward_model, workers, progress)
    store = CheckpointStore(
        run.checkpoints,
        _fingerprint(config, data),
        config.training.checkpoints_kept,
        workers,
        setup.owned_rows,
        run,
    )
    result = setup.trainer(replace(outputs, store=store)).fit(resume=resume)
    policy = setup.whole_policy()

    def finish() -> None:
        assert policy is not None, "the first worker has the whole policy"
        facts = {
            "checkpoints_skipped": store.skipped,
            "workers": workers.size,
            "device": describe_device(data.device),
            "metrics_lines": len(metrics.lines),
        }
        sketch = None if setup.validate is None else setup.validate.sketch
        _finish(run, config, data, Trained(policy, result, began, facts, sketch))

    workers.on_first(finish)
    metrics.close()
    return result


def _fingerprint(config: Config, data: PreparedData) -> str:
    """Fingerprint of everything that training depends on."""
    parts = [config_fingerprint(config), *sorted(data.fingerprint.values())]
    if config.objective.kl_policy is not None:
        parts.append(policy_digest(Path(config.objective.kl_policy)))
    if config.incremental.from_run is not None:
        parts.append(policy_digest(RunDirectory(config.incremental.from_run).policy))
    return "-".join(parts)


def build_trainer(
    config: Config,
    data: PreparedData,
    reward_model: RewardModel | None,
    *,
    progress: Progress | None = None,
    on_epoch_end: EpochHook | None = None,
) -> Trainer:
    """Build a freshly seeded policy and its trainer, in memory and in this process."""
    outputs = TrainingOutputs(progress=progress or Progress(), on_epoch_end=on_epoch_end)
    return build_setup(config, data, reward_model, SINGLE_PROCESS, outputs.progress).trainer(
        outputs
    )


def _open_data(
    config: Config, progress: Progress, run: ClaimedRun, workers: Workers
) -> PreparedData:
    """Open the data, whose rows all workers read to fit the run's encodings; collective."""
    if workers.size == 1:
        return open_data(config, progress, run.path)
    opened: list[OpenedData] = []
    workers.on_each(lambda: opened.append(OpenedData.open(config, progress, run.path)))
    (data,) = opened
    if not workers.broadcast(is_complete(run.encodings)):
        read: list[FittingPart] = []
        share = (workers.rank, workers.size)
        workers.on_each(lambda: read.append(data.part(progress, share)))
        parts = workers.gather_to_first(read[0])
        workers.on_first(lambda: data.fit(parts, progress))
    found = workers.first_then_all(data.restored)
    if found is None:
        raise RunError(f"this node does not see the encodings that worker 0 stored at '{run.path}'")
    return data.prepared(found)


def _reward_model(
    config: Config, data: PreparedData, run: ClaimedRun, progress: Progress, workers: Workers
) -> RewardModel | None:
    """Obtain the run's reward model, whose folds are fitted on all workers; collective."""
    validates = make_estimator(config.training.validation_estimator).needs_reward_model
    # Settings are checked before a reward model is fitted.
    objective = checked_objective(config, data)
    if not (validates or objective.requirements.reward_model):
        return None
    fit = (config.reward_model, data, config.seed, progress, run.reward_model)
    if workers.size > 1:
        workers.on_each(lambda: store_folds(*fit, (workers.rank, workers.size)))
    return workers.first_then_all(lambda: obtain_reward_model(*fit, for_new_rows=validates))


@dataclass(frozen=True)
class Trained:
    """A policy, its history, the time at which training began, facts for the manifest, and the
    sketch of the validation log where it was read."""

    policy: TwoTowerPolicy
    result: TrainingResult
    began: float
    facts: dict[str, Any]
    sketch: RowSketch | None = None


def _finish(run: ClaimedRun, config: Config, data: PreparedData, trained: Trained) -> None:
    """Save the policy, write the manifest, and complete the mirror."""
    policy, result = trained.policy, trained.result
    facts = {
        "offtower": offtower.__version__,
        "config_fingerprint": config_fingerprint(config),
        "data_fingerprint": data.fingerprint,
        "selected_step": result.selected_step,
        "num_items": data.catalogue.num_items,
    }
    run.check_owner()
    save_policy(run.policy, policy, facts)
    used = _logs_used(config, data, result)
    on_record = {"run": str(run.path), "policy": policy_digest(run.policy)}
    for one in used:
        record(one.place, one.log.content.fingerprint, _EVENTS[one.part], on_record)
    run.update_manifest(
        {
            **facts,
            "data_files": _data_files(config, used),
            "validation_rows": _validation_rows(used, trained.sketch),
            "ancestor_rows": _ancestor_rows(config),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "eligible": data.train.schema.to_dict()["eligible"],
            "parameters": sum(p.numel() for p in policy.parameters()),
            "training_rows": data.facts.rows,
            "mean_reward": data.facts.mean_reward,
            "epochs": result.epochs,
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "validation_lower_bound": result.validation,
            "chosen": result.chosen,
            "advice": result.advice,
            **descent(config),
            **trained.facts,
            "seconds": round(time.time() - trained.began, 3),
            **_quarantine_facts(data),
        }
    )
    if run.mirror is not None:
        run.mirror.close()


_EVENTS = {"train": "trained", "validation": "validated"}
"""Kinds of entries in the ledgers of a run's logs (`data.ledger`)."""


@dataclass(frozen=True)
class UsedLog:
    """A log that the policy was learned from ("train"), or its epoch chosen on ("validation")."""

    part: str
    place: str
    log: ParquetLog


def _logs_used(config: Config, data: PreparedData, result: TrainingResult) -> list[UsedLog]:
    """The logs that have a part in the policy, with those that rows were replayed from."""
    chosen = result.validation is not None and result.chosen is None
    train = data.train
    parts: list[tuple[str, str | None, Log | None]] = [
        ("train", config.data.train, train.own if isinstance(train, ReplayLog) else train),
        ("validation", config.data.validation if chosen else None, data.validation),
    ]
    if isinstance(train, ReplayLog):
        parts += [("train", place, log) for place, log in train.older.items()]
    return [
        UsedLog(part, place, log)
        for part, place, log in parts
        if place is not None and isinstance(log, ParquetLog)
    ]


def _data_files(config: Config, used: Sequence[UsedLog]) -> dict[str, list[str]]:
    """Identities of the files that the policy, or one it started from, was made with."""
    files: dict[str, list[str]] = {}
    for one in used:
        files.setdefault(one.part, []).extend(one.log.content.files)
    ancestors: set[str] = set()
    for policy in earlier_folders(config):
        earlier = RunDirectory(Path(policy).parent).manifest().get("data_files", {})
        ancestors.update(file for part in earlier.values() for file in part)
    return {**files, "ancestors": sorted(ancestors)} if ancestors else files


def _validation_rows(used: Sequence[UsedLog], sketch: RowSketch | None) -> dict[str, str] | None:
    """Sketch of the rows that the epoch was chosen on, by which copies of them are found in other
    logs; None where no epoch was chosen.

    sketch: of the validations; without one, as when a run resumes after the last, they are read.
    """
    log = next((one.log for one in used if one.part == "validation"), None)
    if log is None:
        return None
    if sketch is None:
        groups = range(len(log.row_group_sizes))
        tables = log.read_row_groups(groups, sketched_columns(log.schema))
        sketch = RowSketch.of(tables, log.schema)
    return sketch.to_dict()


def _ancestor_rows(config: Config) -> dict[str, str] | None:
    """Sketch of the rows that policies which this one started from were learned from or chosen on;
    None without any."""
    found = RowSketch.empty()
    for policy in earlier_folders(config):
        run = Path(policy).parent
        manifest = RunDirectory(run).manifest()
        stored = (manifest.get(key) for key in ("validation_rows", "ancestor_rows"))
        for sketch in (trained_rows(run), *map(RowSketch.from_dict, stored)):
            found = found if sketch is None else found.merge(sketch)
    return found.to_dict() if found.key.size else None


def _quarantine_facts(data: PreparedData) -> dict[str, Any]:
    """Counts of quarantined rows, from the files that hold them."""
    if data.quarantine is None:
        return {}
    counts = {
        folder.name: sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))
        for folder in sorted(data.quarantine.glob("*"))
        if folder.is_dir()
    }
    return {"quarantine": str(data.quarantine), "quarantined_rows": counts}
