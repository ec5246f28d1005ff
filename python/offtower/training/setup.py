"""What a run trains, and how its parts are spread over workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from offtower.config import Config
from offtower.errors import ConfigError
from offtower.metrics import MetricsLog
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.reward.factored import FactoredRewardModel
from offtower.objectives import Objective, Regression, make_objective
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.sampling import Proposal
from offtower.seeds import seed_torch
from offtower.training.checkpoints import CheckpointStore, OwnedRows
from offtower.training.distributed import Workers
from offtower.training.distributed.item_shard import (
    ItemShard,
    make_shard,
    owned_weights,
    sharded_policy,
    whole_policy,
)
from offtower.training.distributed.sharded_scorer import ShardedScorer
from offtower.training.distributed.sharded_step import ShardedStep
from offtower.training.sampled import SampledTerms, build_proposal
from offtower.training.step import StepLoss, TrainingStep
from offtower.training.trainer import EpochHook, Trainer
from offtower.training.validation import Validator


@dataclass
class TrainingSetup:
    """A fresh, seeded policy and what trains it."""

    config: Config
    data: PreparedData
    workers: Workers
    objective: Objective
    policy: TwoTowerPolicy
    step: StepLoss
    reward_model: RewardModel | None
    proposal: Proposal | None = None
    validate: Validator | None = None
    shard: ItemShard | None = None
    """This worker's items, where the strategy is item_sharded."""
    owned_rows: OwnedRows = field(default_factory=OwnedRows)

    def trainer(
        self,
        *,
        store: CheckpointStore | None = None,
        metrics: MetricsLog | None = None,
        progress: Progress | None = None,
        on_epoch_end: EpochHook | None = None,
    ) -> Trainer:
        """The loop over it all."""
        return Trainer(
            self.config,
            self.data,
            self.policy,
            self.objective,
            self.step,
            self.reward_model,
            store=store,
            metrics=metrics,
            validate=self.validate,
            progress=progress,
            on_epoch_end=on_epoch_end,
            proposal=self.proposal,
            workers=self.workers,
            owned=self._owned(),
        )

    def whole_policy(self) -> TwoTowerPolicy | None:
        """The policy over the whole catalogue, on the first worker; collective."""
        if self.shard is not None:
            return whole_policy(self.policy, self.shard, self.data, self.workers)
        return self.policy if self.workers.first else None

    def _owned(self) -> list[nn.Parameter]:
        parameters = dict(self.policy.named_parameters())
        return [parameters[name] for name in sorted(self.owned_rows.weights)]


def build_setup(
    config: Config,
    data: PreparedData,
    reward_model: RewardModel | None,
    workers: Workers,
    progress: Progress,
) -> TrainingSetup:
    """As the configured strategy says; collective.

    Raises:
        ConfigError: the log, the reward model or the catalogue does not fit what is configured.
    """
    objective = resolve_objective(config, data)
    check_fit_for(objective, data, reward_model)
    if config.training.strategy == "item_sharded":
        return _item_sharded(config, data, objective, reward_model, workers)
    return _replicated(config, data, objective, reward_model, workers, progress)


def _replicated(
    config: Config,
    data: PreparedData,
    objective: Objective,
    reward_model: RewardModel | None,
    workers: Workers,
    progress: Progress,
) -> TrainingSetup:
    seed_torch(config.seed, "policy")
    policy = TwoTowerPolicy(config.policy, data.context_encoding, data.item_encoding)
    proposal = build_proposal(config, objective, data, policy, progress)
    sampled = (
        None
        if proposal is None
        else SampledTerms(policy, data.items, proposal, config.sampling.exact_every)
    )
    chunk = config.training.item_chunk
    validate = (
        Validator(data, config.training, config.evaluation.confidence, reward_model, workers)
        if _validates(data)
        else None
    )
    return TrainingSetup(
        config,
        data,
        workers,
        objective,
        policy,
        TrainingStep(policy, objective, data.items, reward_model, chunk, sampled, workers),
        reward_model,
        proposal,
        validate,
    )


def _item_sharded(
    config: Config,
    data: PreparedData,
    objective: Objective,
    reward_model: RewardModel | None,
    workers: Workers,
) -> TrainingSetup:
    if config.training.terms == "sampled" or objective.proposal is not None:
        raise ConfigError(
            "training.strategy=item_sharded computes exact terms over every worker's items; for "
            "sampled terms take training.strategy=replicated"
        )
    if reward_model is not None and not isinstance(reward_model, FactoredRewardModel):
        raise ConfigError(
            "training.strategy=item_sharded needs a reward model whose items can be split: set "
            "reward_model.kind=factored"
        )
    shard = make_shard(config.policy, data, workers)
    seed_torch(config.seed, "policy")
    policy = sharded_policy(config.policy, data, shard)
    model = None if reward_model is None else reward_model.over(shard.plain)
    chunk = config.training.item_chunk
    validate = (
        Validator(
            data,
            config.training,
            config.evaluation.confidence,
            model,
            workers,
            lambda judged: ShardedScorer(judged, shard, workers, chunk),
            together=True,
        )
        if _validates(data)
        else None
    )
    owned = frozenset(owned_weights(policy, shard).values())
    return TrainingSetup(
        config,
        data,
        workers,
        objective,
        policy,
        ShardedStep(policy, objective, shard, model, workers, chunk),
        model,
        None,
        validate,
        shard,
        OwnedRows(owned, shard.size, shard.num_items),
    )


def _validates(data: PreparedData) -> bool:
    return data.validation is not None and data.validation.schema.pscore is not None


def resolve_objective(config: Config, data: PreparedData) -> Objective:
    """The configured objective; `auto` picks by what the log and the configuration offer.

    auto: clipped_dr where there are propensities and a reward model, weighted_likelihood with
    propensities alone, regression without them.
    """
    name = config.objective.name
    if name == "auto":
        if data.train.schema.pscore is None:
            name = "regression"
        elif config.reward_model.kind == "none":
            name = "weighted_likelihood"
        else:
            name = "clipped_dr"
    objective = make_objective(name, config.objective.arguments)
    if isinstance(objective, Regression):
        objective = objective.resolve(data.facts.binary_reward)
    return objective


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
