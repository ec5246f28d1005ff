"""What is refused before any time is spent."""

from __future__ import annotations

from pathlib import Path

from offtower.config import Config, TrainingConfig
from offtower.errors import ConfigError
from offtower.evaluation.scoring.clusters import MAX_CLUSTERS
from offtower.models.reward.base import RewardModel
from offtower.objectives import Objective, Potec
from offtower.prepare import PreparedData


def check_fit_for(
    objective: Objective, data: PreparedData, reward_model: RewardModel | None
) -> None:
    """Refuse an objective whose needs the log does not meet, before any time is spent.

    Raises:
        ConfigError: no propensities, no reward model, or rewards below zero, where the objective
            cannot do so.
    """
    if objective.needs_reward_model and reward_model is None:
        raise ConfigError(
            f"objective '{objective.name}' needs a reward model: set reward_model.kind to dense "
            "(small catalogues, any scikit-learn regressor) or factored (two towers, any size)"
        )
    if objective.needs_pscore and data.train.schema.pscore is None:
        raise ConfigError(
            f"objective '{objective.name}' needs the logged propensities: name their column as "
            "'pscore' in the log's schema, or use objective.name=regression"
        )
    reward_range = data.train.schema.reward_range
    if objective.needs_nonnegative_reward and reward_range[0] < 0:
        raise ConfigError(
            f"objective '{objective.name}' is defined for rewards of zero or more, but the log's "
            f"reward_range begins at {reward_range[0]}; shift the rewards, or use another objective"
        )


def check_terms_for(objective: Objective, training: TrainingConfig) -> None:
    """Refuse an objective that sums over the whole catalogue where it is not at hand.

    Raises:
        ConfigError: sampled terms, or items that are spread over workers.
    """
    if not objective.needs_square_sum:
        return
    if training.terms == "sampled":
        raise ConfigError(
            f"objective '{objective.name}' sums squares over all items, which costs O(items) in "
            "each step and no draws can stand for: take training.terms=exact, or weighted_"
            "likelihood with sampled terms"
        )
    if training.strategy == "item_sharded":
        raise ConfigError(
            f"objective '{objective.name}' needs the whole catalogue on each worker: take "
            "training.strategy=replicated"
        )


def check_course_of(config: Config, objective: Objective) -> None:
    """Refuse a start, a policy to stay near to, or a course of the temperature that another setting
    contradicts.

    Raises:
        ConfigError: two starts, a uniform one of towers that cannot have it, no policy where one is
            named, two who say what the temperature is, or an objective without one.
    """
    if config.training.start == "uniform":
        _check_uniform_start(config)
    _check_stored_policies(config)
    if config.training.temperature_from is None:
        return
    if config.policy.learn_temperature:
        raise ConfigError(
            "training.temperature_from sets the temperature that policy.learn_temperature would "
            "learn: leave one of them out"
        )
    if not objective.uses_policy:
        raise ConfigError(
            f"objective '{objective.name}' learns scores without a temperature, so that "
            "training.temperature_from would change nothing: leave it out"
        )


def _check_uniform_start(config: Config) -> None:
    if config.training.warm_start is not None:
        raise ConfigError(
            "training.start=uniform and training.warm_start are two starts: leave one of them out"
        )
    if config.policy.context_tower.normalize:
        raise ConfigError(
            "training.start=uniform begins with a context embedding of zero, which "
            "policy.context_tower.normalize cannot bring to unit length: raise policy.temperature, "
            "or begin hot with training.temperature_from, for an almost uniform start"
        )
    sides = [("context", config.policy.context_tower)]
    if config.policy.item_bias:
        sides.append(("item", config.policy.item_tower))
    for side, tower in sides:
        if tower.module is not None:
            raise ConfigError(
                "training.start=uniform does not know the last weights of the module "
                f"'{tower.module}' of policy.{side}_tower: begin with zeros there in the module "
                "itself, and take training.start=random"
            )


def _check_stored_policies(config: Config) -> None:
    for setting, folder in (
        ("training.warm_start", config.training.warm_start),
        ("objective.kl_policy", config.objective.kl_policy),
    ):
        if folder is not None and not (Path(folder) / "policy.json").is_file():
            raise ConfigError(
                f"{setting}: there is no policy at '{folder}' (a folder with policy.json, such as "
                "runs/<name>/policy of a run that has finished)"
            )
    if config.objective.kl_policy is not None and config.training.strategy == "item_sharded":
        raise ConfigError(
            "objective.kl_policy reads a policy over the whole catalogue: take "
            "training.strategy=replicated, or objective.kl without it, which is estimated from "
            "logged propensities"
        )


def check_two_stage(objective: Potec, config: Config, data: PreparedData) -> None:
    """Refuse what a policy in two stages cannot do.

    Raises:
        ConfigError: naming the setting, and what to set in its place.
    """
    settings, policy, training = config.objective, config.policy, config.training
    regularised = settings.kl > 0.0 or settings.imitation > 0.0 or settings.entropy > 0.0
    refused = {
        "ranks the items of a cluster by two towers: set reward_model.kind=factored": (
            config.reward_model.kind != "factored"
        ),
        "needs the whole catalogue in each step: take training.terms=exact": (
            training.terms != "exact"
        ),
        "needs the whole catalogue on each worker: take training.strategy=replicated": (
            training.strategy != "replicated"
        ),
        "reads frozen logits in float32: take training.precision=float32": (
            training.precision != "float32"
        ),
        "starts from the reward model: leave training.warm_start and training.start out": (
            training.warm_start is not None or training.start != "random"
        ),
        "has its sharpness in objective.arguments: leave policy.temperature at 1, and "
        "policy.learn_temperature and training.temperature_from out": (
            policy.learn_temperature
            or policy.temperature != 1.0
            or training.temperature_from is not None
        ),
        "has a frozen second stage, which prices on items cannot move: leave objective.kl, "
        "imitation and entropy at 0": regularised,
    }
    for reason, applies in refused.items():
        if applies:
            raise ConfigError(f"objective 'potec' {reason}")
    clusters = objective.clusters
    if isinstance(clusters, str):
        known = [spec.name for spec in data.item_encoding.specs if spec.kind == "category"]
        if clusters not in known:
            raise ConfigError(
                f"objective setting clusters='{clusters}' is no category of the catalogue; it has "
                f"{', '.join(known) or 'none'} (or give a number of clusters)"
            )
        clusters = data.item_encoding.cardinality(clusters)
    if clusters > MAX_CLUSTERS:
        raise ConfigError(
            f"objective setting clusters='{objective.clusters}' gives {clusters:,} clusters, at "
            f"most {MAX_CLUSTERS:,}: take a coarser category, or a smaller number"
        )
