"""One training run in its directory, from a configuration to a saved policy."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

import offtower
from offtower.config import Config, config_fingerprint
from offtower.errors import ConfigError
from offtower.evaluation.estimators import make_estimator
from offtower.metrics import MetricsLog
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.reward.fit import obtain_reward_model
from offtower.models.store import load_policy, save_policy
from offtower.objectives import Objective, Regression, Regularised, make_objective
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress
from offtower.run_directory import RunDirectory
from offtower.seeds import seed_torch
from offtower.training.auto import train_auto
from offtower.training.checkpoint import CheckpointStore
from offtower.training.checks import check_fit_for
from offtower.training.sampled import build_proposal
from offtower.training.trainer import EpochHook, Trainer, TrainingResult
from offtower.training.validation import Validator


def train_run(
    config: Config,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    hook: Callable[[PreparedData], EpochHook] | None = None,
) -> TrainingResult:
    """Train as configured and write runs/<name>/policy.

    Args:
        config: the run.
        resume: go on from the newest checkpoint of the same configuration; a run that has not
            begun yet begins.
        progress: where progress is drawn.
        hook: builds a function that adds numbers to each epoch's metrics (a simulator's truth).

    Raises:
        RunError: the directory belongs to another configuration, or exists and `resume` is false.
        ConfigError, DataError: see there.
    """
    progress = progress or Progress()
    began = time.time()
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    run = RunDirectory(config.run_directory)
    run.claim(config, resume=resume)
    data = open_data(config, progress, run.path)
    if uses_auto(config, data):
        automatic = train_auto(
            config,
            data,
            progress=progress,
            metrics=MetricsLog(run.metrics_path),
            directory=run.path / "auto",
            on_epoch_end=None if hook is None else hook(data),
        )
        more = {"auto": automatic.report}
        _finish(run, config, data, automatic.policy, automatic.result, began, more)
        return automatic.result
    judged_by_model = make_estimator(config.training.validation_estimator).needs_reward_model
    reward_model = (
        obtain_reward_model(
            config.reward_model,
            data,
            config.seed,
            progress,
            run.reward_model,
            for_new_rows=judged_by_model,
        )
        if judged_by_model or resolve_objective(config, data).needs_reward_model
        else None
    )
    store = CheckpointStore(
        run.checkpoints,
        f"{config_fingerprint(config)}-{'-'.join(sorted(data.fingerprint.values()))}",
        config.training.checkpoints_kept,
    )
    trainer = build_trainer(
        config,
        data,
        reward_model,
        store=store,
        metrics=MetricsLog(run.metrics_path),
        progress=progress,
        on_epoch_end=None if hook is None else hook(data),
    )
    result = trainer.fit(resume=resume)
    _finish(
        run,
        config,
        data,
        trainer.policy,
        result,
        began,
        {"checkpoints_skipped": store.skipped},
    )
    return result


def uses_auto(config: Config, data: PreparedData) -> bool:
    """Whether `objective.name=auto` chooses between learners: where propensities are known."""
    return config.objective.name == "auto" and data.train.schema.pscore is not None


def _finish(
    run: RunDirectory,
    config: Config,
    data: PreparedData,
    policy: TwoTowerPolicy,
    result: TrainingResult,
    began: float,
    more: dict[str, Any],
) -> None:
    """Save the policy and say in the manifest what made it."""
    facts = {
        "offtower": offtower.__version__,
        "config_fingerprint": config_fingerprint(config),
        "data_fingerprint": data.fingerprint,
        "selected_step": result.selected_step,
        "num_items": data.catalogue.num_items,
    }
    save_policy(run.policy, policy, facts)
    run.update_manifest(
        {
            **facts,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in policy.parameters()),
            "training_rows": data.facts.rows,
            "mean_reward": data.facts.mean_reward,
            "epochs": result.epochs,
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "validation_lower_bound": result.validation,
            **more,
            "seconds": round(time.time() - began, 3),
            **_quarantine_facts(data),
        }
    )


def build_trainer(
    config: Config,
    data: PreparedData,
    reward_model: RewardModel | None,
    *,
    store: CheckpointStore | None = None,
    metrics: MetricsLog | None = None,
    progress: Progress | None = None,
    on_epoch_end: EpochHook | None = None,
) -> Trainer:
    """A fresh, seeded policy and its trainer."""
    objective = resolve_objective(config, data)
    check_fit_for(objective, data, reward_model)
    seed_torch(config.seed, "policy")
    policy = TwoTowerPolicy(config.policy, data.context_encoding, data.item_encoding)
    if config.training.warm_start is not None:
        warm_start(policy, Path(config.training.warm_start))
    validate = (
        Validator(data, config.training, config.evaluation.confidence, reward_model)
        if data.validation is not None and data.validation.schema.pscore is not None
        else None
    )
    return Trainer(
        config,
        data,
        policy,
        objective,
        reward_model,
        store=store,
        metrics=metrics,
        validate=validate,
        progress=progress,
        on_epoch_end=on_epoch_end,
        proposal=build_proposal(config, objective, data, policy, progress or Progress()),
    )


def warm_start(policy: TwoTowerPolicy, folder: Path) -> None:
    """Fill a policy with the weights of a stored one.

    Raises:
        RunError: there is none.
        ConfigError: it has other sizes, or was learned with other encodings.
    """
    stored, _ = load_policy(folder)
    for side in ("context_encoding", "item_encoding"):
        if getattr(stored, side).to_dict() != getattr(policy, side).to_dict():
            raise ConfigError(
                f"training.warm_start: the policy at '{folder}' was learned with another "
                f"{side.replace('_', ' ')}; begin from a run on the same log and catalogue"
            )
    try:
        policy.load_state_dict(stored.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"training.warm_start: the policy at '{folder}' does not fit the configured one "
            f"({error}); take over its 'policy' settings"
        ) from None


def resolve_objective(config: Config, data: PreparedData) -> Objective:
    """The configured objective; `auto` without propensities is regression (with them, it is no
    objective: see `offtower.training.auto`)."""
    name = config.objective.name
    if name == "auto":
        name = "regression"
    settings = config.objective
    objective = make_objective(name, settings.arguments)
    if isinstance(objective, Regression):
        objective = objective.resolve(data.facts.binary_reward)
    if settings.kl == settings.imitation == settings.entropy == 0.0:
        return objective
    if not objective.uses_policy:
        raise ConfigError(
            f"objective '{name}' has no policy terms that objective.kl, imitation or entropy "
            "could be added to"
        )
    return Regularised(
        objective, kl=settings.kl, imitation=settings.imitation, entropy=settings.entropy
    )


def _quarantine_facts(data: PreparedData) -> dict[str, Any]:
    """Bad rows that were set aside, counted from the files that hold them."""
    if data.quarantine is None:
        return {}
    counts = {
        folder.name: sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))
        for folder in sorted(data.quarantine.glob("*"))
        if folder.is_dir()
    }
    return {"quarantine": str(data.quarantine), "quarantined_rows": counts}
