"""Checks of a configuration against the objective and the data, before anything is fitted."""

from __future__ import annotations

from pathlib import Path

from offtower.ancestry import check_earlier_run
from offtower.config import Config, TrainingConfig
from offtower.data.manifest import find_parquet_files
from offtower.errors import ConfigError, DataError
from offtower.evaluation.scoring.clusters import MAX_CLUSTERS
from offtower.models.reward.base import RewardModel
from offtower.objectives import Objective, Potec, make_objective
from offtower.prepare import PreparedData
from offtower.run_directory import RunDirectory


def check_run(config: Config, *, resume: bool = False) -> None:
    """Check what needs no data to be read, before a cluster starts or anything is written.

    Raises:
        RunError: see `RunDirectory.check`.
        DataError: a log or the catalogue is missing.
        ConfigError: an unknown objective or setting of it, or a missing stored policy.
    """
    check_continuation(config)
    RunDirectory(config.run_directory).check(config, resume=resume)
    check_paths(config)
    if config.objective.name != "auto":
        make_objective(config.objective.name, config.objective.arguments)
    _check_stored_policies(config)


def check_continuation(config: Config) -> None:
    """Check the settings of a run that goes on from an earlier one, and that this is finished.

    Raises:
        ConfigError: settings contradict it.
        RunError: see `check_earlier_run`.
    """
    settings = config.incremental
    if settings.from_run is None:
        if settings.replay.logs:
            raise ConfigError(
                "incremental.replay is for runs that go on from an earlier one: name it "
                "(incremental.from_run, or --from), or unset incremental.replay.logs"
            )
        return
    if config.objective.name == "auto":
        raise ConfigError(
            "objective.name=auto chooses between candidates on rows that none of them has seen; "
            "those of an earlier run have seen the replayed rows, so it cannot go on from "
            "incremental.from_run. Unset that, and let auto choose anew on all logs that you keep; "
            "or name an objective, that of the earlier run"
        )
    if config.training.warm_start is not None or config.training.initialization != "random":
        raise ConfigError(
            "incremental.from_run sets the initial weights: unset training.warm_start and "
            "training.initialization"
        )
    check_earlier_run(config)


def check_paths(config: Config) -> None:
    """Check that the logs and the catalogue of `config.data` exist.

    Raises:
        DataError: one is missing or unfinished; names its setting.
    """
    for key in ("train", "validation", "test", "catalogue"):
        path = getattr(config.data, key)
        if path is None:
            continue
        try:
            find_parquet_files(path, "catalogue" if key == "catalogue" else "log")
        except DataError as error:
            raise DataError(f"data.{key}: {error}") from None


def check_data(objective: Objective, data: PreparedData, reward_model: RewardModel | None) -> None:
    """Check that the log and the reward model meet the objective's requirements.

    Raises:
        ConfigError: propensities or a reward model are missing, rewards may be negative, or the
            objective cannot be restricted to eligible items.
    """
    requirements = objective.requirements
    check_eligible(objective, data)
    if requirements.reward_model and reward_model is None:
        raise ConfigError(
            f"objective '{objective.name}' needs a reward model: set reward_model.kind to dense "
            "(small catalogues, any scikit-learn regressor) or factored (two towers, any size)"
        )
    if requirements.pscore and data.train.schema.pscore is None:
        raise ConfigError(
            f"objective '{objective.name}' needs the logged propensities: name their column as "
            "'pscore' in the log's schema, or use objective.name=regression"
        )
    reward_range = data.train.schema.reward_range
    if requirements.nonnegative_reward and reward_range[0] < 0:
        raise ConfigError(
            f"objective '{objective.name}' is defined for rewards of zero or more, but the log's "
            f"reward_range begins at {reward_range[0]}; shift the rewards, or use another objective"
        )


def check_eligible(objective: Objective, data: PreparedData) -> None:
    """Check that an objective can be restricted to eligible items, where the log names them.

    Raises:
        ConfigError: it cannot.
    """
    if objective.requirements.square_sum and data.train.schema.eligible is not None:
        raise ConfigError(
            f"objective '{objective.name}' sums squares over all items, whichever are eligible in "
            "a row: use objective.name=weighted_likelihood, which sums over the eligible ones"
        )


def check_terms(objective: Objective, training: TrainingConfig) -> None:
    """Check that a step reads the whole catalogue if the objective sums over all items.

    Raises:
        ConfigError: terms are sampled, or items are sharded over workers.
    """
    if not objective.requirements.square_sum:
        return
    if training.terms == "sampled":
        raise ConfigError(
            f"objective '{objective.name}' sums squares over all items in each step, which draws "
            "cannot estimate: set training.terms=exact, or use weighted_likelihood with sampled "
            "terms"
        )
    if training.strategy == "item_sharded":
        raise ConfigError(
            f"objective '{objective.name}' needs the whole catalogue on each worker: set "
            "training.strategy=replicated"
        )


def check_start_and_temperature(config: Config, objective: Objective) -> None:
    """Check the initial weights, the stored policies and the temperature schedule.

    Raises:
        ConfigError: conflicting or impossible initial weights, a missing stored policy, conflicting
            temperature settings, or an objective without a temperature.
    """
    if config.training.initialization == "uniform":
        _check_uniform_start(config)
    _check_stored_policies(config)
    if config.training.initial_temperature is None:
        return
    if config.policy.learn_temperature:
        raise ConfigError(
            "training.initial_temperature schedules the temperature that "
            "policy.learn_temperature would learn: unset one of them"
        )
    if not objective.requirements.policy_terms:
        raise ConfigError(
            f"objective '{objective.name}' fits scores without a temperature, so "
            "training.initial_temperature would have no effect: unset it"
        )


def _check_uniform_start(config: Config) -> None:
    if config.training.warm_start is not None:
        raise ConfigError(
            "training.initialization=uniform and training.warm_start both set the initial weights: "
            "unset one of them"
        )
    if config.policy.context_tower.normalize:
        raise ConfigError(
            "training.initialization=uniform starts from a context embedding of zero, which "
            "policy.context_tower.normalize cannot scale to unit length: raise policy.temperature "
            "or set training.initial_temperature for an almost uniform start"
        )
    sides = [("context", config.policy.context_tower)]
    if config.policy.item_bias:
        sides.append(("item", config.policy.item_tower))
    for side, tower in sides:
        if tower.module is not None:
            raise ConfigError(
                "training.initialization=uniform cannot find the last layer of the module "
                f"'{tower.module}' of policy.{side}_tower: initialize it with zeros in the module "
                "itself, and set training.initialization=random"
            )


def _check_stored_policies(config: Config) -> None:
    for setting, folder in (
        ("training.warm_start", config.training.warm_start),
        ("objective.kl_policy", config.objective.kl_policy),
    ):
        if folder is not None and not (Path(folder) / "policy.json").is_file():
            raise ConfigError(
                f"{setting}: there is no policy at '{folder}' (a folder with policy.json, such as "
                "runs/<name>/policy of a finished run)"
            )
    if config.objective.kl_policy is not None and config.training.strategy == "item_sharded":
        raise ConfigError(
            "objective.kl_policy reads a policy over the whole catalogue: set "
            "training.strategy=replicated, or use objective.kl without it, which is estimated from "
            "logged propensities"
        )


def check_two_stage(objective: Objective, config: Config, data: PreparedData) -> None:
    """Check the settings that a two-stage policy does not support, and its clusters.

    Raises:
        ConfigError: names the setting and its replacement.
    """
    assert isinstance(objective, Potec), "the only objective of two-stage policies"
    settings, policy, training = config.objective, config.policy, config.training
    refused = {
        "ranks the items of a cluster by two towers: set reward_model.kind=factored": (
            config.reward_model.kind != "factored"
        ),
        "needs the whole catalogue in each step: set training.terms=exact": (
            training.terms != "exact"
        ),
        "needs the whole catalogue on each worker: set training.strategy=replicated": (
            training.strategy != "replicated"
        ),
        "reads frozen logits in float32: set training.precision=float32": (
            training.precision != "float32"
        ),
        "starts from the reward model: unset training.warm_start and training.initialization": (
            training.warm_start is not None or training.initialization != "random"
        ),
        "starts from the reward model, not from a policy: unset incremental.from_run": (
            config.incremental.from_run is not None
        ),
        "freezes the reward model's towers, which need a table of items of their own: set "
        "reward_model.tower.history.items=own": (
            config.reward_model.tower.history.items != "own"
            and any(spec.history for spec in data.context_encoding.specs)
        ),
        "has its inverse_temperature in objective.arguments: leave policy.temperature at 1, and "
        "unset policy.learn_temperature and training.initial_temperature": (
            policy.learn_temperature
            or policy.softmax_temperature() != 1.0
            or training.initial_temperature is not None
        ),
        "has a frozen second stage, which regularization of items cannot move: leave objective.kl, "
        "imitation and entropy at 0": max(settings.kl, settings.imitation, settings.entropy) > 0.0,
    }
    for reason, applies in refused.items():
        if applies:
            raise ConfigError(f"objective 'potec' {reason}")
    clusters = objective.clusters
    if isinstance(clusters, str):
        known = [spec.name for spec in data.item_encoding.specs if spec.kind == "category"]
        if clusters not in known:
            raise ConfigError(
                f"objective setting clusters='{clusters}' is not a category of the catalogue; it "
                f"has {', '.join(known) or 'none'} (or give a number of clusters)"
            )
        clusters = data.item_encoding.cardinality(clusters)
    if clusters > MAX_CLUSTERS:
        raise ConfigError(
            f"objective setting clusters='{objective.clusters}' gives {clusters:,} clusters, at "
            f"most {MAX_CLUSTERS:,}: use a coarser category or fewer clusters"
        )
