"""What is refused before any time is spent."""

from __future__ import annotations

from offtower.config import Config, TrainingConfig
from offtower.errors import ConfigError
from offtower.evaluation.clusters import MAX_CLUSTERS
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
        "starts from the reward model: leave training.warm_start out": (
            training.warm_start is not None
        ),
        "has its sharpness in objective.arguments: leave policy.temperature at 1 and "
        "policy.learn_temperature out": policy.learn_temperature or policy.temperature != 1.0,
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
