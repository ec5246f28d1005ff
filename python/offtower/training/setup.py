"""What a run trains, and how its parts are spread over workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from offtower.config import Config
from offtower.errors import ConfigError
from offtower.metrics import MetricsLog
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.reward.factored import FactoredRewardModel
from offtower.objectives import Objective, Potec, Regression, Regularised, make_objective
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.sampling import Proposal
from offtower.seeds import seed_torch
from offtower.training.checkpoints import CheckpointStore, OwnedRows
from offtower.training.checks import (
    check_course_of,
    check_fit_for,
    check_terms_for,
    check_two_stage,
)
from offtower.training.distributed import Workers
from offtower.training.distributed.item_shard import (
    ItemShard,
    make_shard,
    owned_weights,
    sharded_policy,
    whole_policy,
)
from offtower.training.distributed.sharded_sampled import ShardedSampledTerms
from offtower.training.distributed.sharded_scorer import ShardedScorer
from offtower.training.distributed.sharded_step import ShardedStep
from offtower.training.known_policy import KnownPolicy
from offtower.training.sampled import SampledTerms, build_proposal
from offtower.training.start import load_alike, start_uniform, warm_start
from offtower.training.step import StepLoss, TrainingStep
from offtower.training.trainer import EpochHook, Trainer
from offtower.training.two_stage import TwoStage, build_two_stage
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
    """As the configured strategy says, on the device of `data`; collective.

    Raises:
        ConfigError: the log, the reward model or the catalogue does not fit what is configured.
    """
    objective = checked_objective(config, data)
    check_fit_for(objective, data, reward_model)
    if config.training.strategy == "item_sharded":
        return _item_sharded(config, data, objective, reward_model, workers, progress)
    return _replicated(config, data, objective, reward_model, workers, progress)


def _replicated(
    config: Config,
    data: PreparedData,
    objective: Objective,
    reward_model: RewardModel | None,
    workers: Workers,
    progress: Progress,
) -> TrainingSetup:
    two_stage: TwoStage | None = None
    if isinstance(objective, Potec):
        assert isinstance(reward_model, FactoredRewardModel), "checked with the configuration"
        two_stage = build_two_stage(config, objective, data, reward_model, progress)
    seed_torch(config.seed, "policy")
    # Weights are drawn on the CPU: on every device a run starts from the same ones.
    policy = (
        TwoTowerPolicy(config.policy, data.context_encoding, data.item_encoding)
        if two_stage is None
        else two_stage.policy
    )
    policy.to(data.device)
    policy.train_in(getattr(torch, config.training.precision))
    if config.training.warm_start is not None:
        warm_start(policy, Path(config.training.warm_start))
    if config.training.start == "uniform":
        start_uniform(policy)
    proposal = build_proposal(config, objective, data, policy, progress)
    sampled = (
        None
        if proposal is None
        else SampledTerms(policy, data.items, proposal, config.sampling.exact_every)
    )
    chunk = config.training.item_chunk
    known: KnownPolicy | None = None
    if config.objective.kl_policy is not None:
        logged = load_alike(Path(config.objective.kl_policy), policy, "objective.kl_policy")
        known = KnownPolicy(logged.to(data.device), data.items, chunk)
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
        TrainingStep(
            policy,
            objective,
            data.items if two_stage is None else two_stage.items,
            reward_model,
            chunk,
            sampled,
            workers,
            known,
            None if two_stage is None else two_stage.weights,
        ),
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
    progress: Progress,
) -> TrainingSetup:
    if reward_model is not None and not isinstance(reward_model, FactoredRewardModel):
        raise ConfigError(
            "training.strategy=item_sharded needs a reward model whose items can be split: set "
            "reward_model.kind=factored"
        )
    if config.training.precision != "float32":
        raise ConfigError(
            "training.strategy=item_sharded sums gradients of embeddings over workers, in float32: "
            "take training.precision=float32, or training.strategy=replicated"
        )
    if config.training.warm_start is not None:
        raise ConfigError(
            "training.warm_start reads a policy over the whole catalogue: take "
            "training.strategy=replicated"
        )
    shard = make_shard(config.policy, data, workers)
    seed_torch(config.seed, "policy")
    policy = sharded_policy(config.policy, data, shard)
    if config.training.start == "uniform":
        start_uniform(policy)
    model = None if reward_model is None else reward_model.over(data.items.beside(shard.plain))
    proposal = build_proposal(config, objective, data, policy, progress, shard.items)
    sampled = (
        None
        if proposal is None
        else ShardedSampledTerms(policy, shard, proposal, workers, config.sampling.exact_every)
    )
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
        ShardedStep(policy, objective, shard, model, workers, chunk, sampled),
        model,
        proposal,
        validate,
        shard,
        OwnedRows(owned, shard.size, shard.num_items),
    )


def _validates(data: PreparedData) -> bool:
    return data.validation is not None and data.validation.schema.pscore is not None


def uses_auto(config: Config, data: PreparedData) -> bool:
    """Whether `objective.name=auto` chooses between learners: where propensities are known."""
    return config.objective.name == "auto" and data.train.schema.pscore is not None


def checked_objective(config: Config, data: PreparedData) -> Objective:
    """The configured objective, where nothing else that is configured contradicts it.

    Raises:
        ConfigError: something does.
    """
    objective = resolve_objective(config, data)
    check_terms_for(objective, config.training)
    check_course_of(config, objective)
    return objective


def resolve_objective(config: Config, data: PreparedData) -> Objective:
    """The configured objective; `auto` without propensities is regression (with them, it is no
    objective: see `offtower.training.auto`)."""
    name = config.objective.name
    if name == "auto":
        name = "regression"
    settings = config.objective
    objective = make_objective(name, settings.arguments)
    if isinstance(objective, Potec):
        check_two_stage(objective, config, data)
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
        objective,
        kl=settings.kl,
        imitation=settings.imitation,
        entropy=settings.entropy,
        known=settings.kl_policy is not None,
    )
