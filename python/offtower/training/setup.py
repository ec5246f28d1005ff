"""Build the policy, the step and the trainer of a run, for one worker or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from offtower.ancestry import check_same_towers
from offtower.config import Config
from offtower.errors import ConfigError
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.reward.factored import FactoredRewardModel
from offtower.objectives import Objective, Regularized, SlateObjective, make_objective
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import seed_torch
from offtower.training.checkpoints import OwnedRows
from offtower.training.checks import (
    check_data,
    check_start_and_temperature,
    check_terms,
    check_two_stage,
)
from offtower.training.continuation import continue_run
from offtower.training.distributed.item_shard import (
    ItemShard,
    fill_from_whole,
    make_shard,
    owned_table_rows,
    owned_weights,
    sharded_policy,
    whole_policy,
)
from offtower.training.distributed.sharded_sampled import ShardedSampledTerms
from offtower.training.distributed.sharded_scorer import ShardedScorer
from offtower.training.distributed.sharded_step import ShardedStep
from offtower.training.initialization import (
    initialize_uniform,
    load_compatible_policy,
    warm_start,
)
from offtower.training.reference_policy import ReferencePolicy
from offtower.training.sampled import SampledTerms, build_proposal
from offtower.training.step import ReplicatedStep, TrainedPolicy, TrainingStep
from offtower.training.suitability import suitability_notes
from offtower.training.trainer import Start, Trainer, TrainingOutputs
from offtower.training.two_stage import build_two_stage
from offtower.training.validation import RowScorer, Validator
from offtower.training.workers import Workers


@dataclass(frozen=True)
class SetupInputs:
    """What a policy and its step are built from."""

    config: Config
    data: PreparedData
    objective: Objective
    reward_model: RewardModel | None
    workers: Workers
    progress: Progress


@dataclass(frozen=True)
class TrainingSetup:
    """A freshly seeded policy, with its step and validation."""

    config: Config
    data: PreparedData
    step: TrainingStep
    validate: Validator | None
    shard: ItemShard | None = None
    """This worker's items under training.strategy=item_sharded."""
    owned_rows: OwnedRows = field(default_factory=OwnedRows)
    start: Start | None = None
    """Takes weights and optimizer state over from an earlier run; not called by a run that resumes
    from a checkpoint, which has both."""

    @property
    def policy(self) -> TwoTowerPolicy:
        return self.step.policy

    def trainer(self, outputs: TrainingOutputs | None = None) -> Trainer:
        return Trainer(
            self.config,
            self.data,
            self.step,
            validate=self.validate,
            outputs=outputs,
            start=self.start,
        )

    def whole_policy(self) -> TwoTowerPolicy | None:
        """Return the policy over the whole catalogue on the first worker; collective."""
        workers = self.step.workers
        if self.shard is not None:
            return whole_policy(self.policy, self.shard, self.data, workers)
        return self.policy if workers.first else None


def build_setup(
    config: Config,
    data: PreparedData,
    reward_model: RewardModel | None,
    workers: Workers,
    progress: Progress,
) -> TrainingSetup:
    """Build the configured strategy on the device of `data`; collective.

    Raises:
        ConfigError: the log, the reward model or the catalogue does not fit the configuration.
    """
    objective = checked_objective(config, data)
    config = with_temperature(config, objective)
    check_data(objective, data, reward_model)
    if workers.first:
        for note in suitability_notes(config, objective, data):
            progress.note(f"note: {note}")
    build = _item_sharded if config.training.strategy == "item_sharded" else _replicated
    return build(SetupInputs(config, data, objective, reward_model, workers, progress))


def with_temperature(config: Config, objective: Objective) -> Config:
    """Return the configuration with the objective's temperature where it has none."""
    policy = config.policy
    temperature = policy.softmax_temperature(objective.name)
    return replace(config, policy=replace(policy, temperature=temperature))


def _replicated(inputs: SetupInputs) -> TrainingSetup:
    config, data, objective = inputs.config, inputs.data, inputs.objective
    trained = _POLICY_BUILDERS[objective.requirements.policy](inputs)
    policy = trained.policy
    policy.train_in(getattr(torch, config.training.precision))
    if config.training.warm_start is not None:
        warm_start(policy, Path(config.training.warm_start))
    if config.training.initialization == "uniform":
        initialize_uniform(policy)
    start: Start | None = None
    if config.incremental.from_run is not None:
        check_same_towers(policy, config)

        def start(optimizer: torch.optim.Optimizer) -> None:
            earlier = continue_run(config, data, policy, inputs.progress)
            earlier.fill_optimizer(optimizer, policy, {})

    proposal = build_proposal(config, objective, data, policy, inputs.progress)
    step = ReplicatedStep(
        trained,
        objective,
        inputs.reward_model,
        item_chunk=config.training.item_chunk,
        sampled=None
        if proposal is None
        else SampledTerms(policy, data.items, proposal, config.sampling.exact_every),
        workers=inputs.workers,
        reference=_reference(inputs, policy),
        mean_row_weight=data.facts.mean_row_weight,
    )
    return TrainingSetup(config, data, step, _validator(inputs, inputs.reward_model), start=start)


def _two_tower(inputs: SetupInputs) -> TrainedPolicy:
    config, data = inputs.config, inputs.data
    seed_torch(config.seed, "policy")
    # Weights are drawn on the CPU: a run starts from the same ones on every device.
    policy = TwoTowerPolicy(config.policy, data.context_encoding, data.item_encoding)
    return TrainedPolicy(policy.to(data.device), data.items)


def _two_stage(inputs: SetupInputs) -> TrainedPolicy:
    assert isinstance(inputs.reward_model, FactoredRewardModel), "see check_two_stage"
    return build_two_stage(
        inputs.config,
        inputs.objective,
        inputs.data,
        inputs.reward_model,
        inputs.progress,
        inputs.workers,
    )


_POLICY_BUILDERS: Mapping[str, Callable[[SetupInputs], TrainedPolicy]] = {
    "two_tower": _two_tower,
    "two_stage": _two_stage,
}
"""By `Requirements.policy`."""


def _reference(inputs: SetupInputs, policy: TwoTowerPolicy) -> ReferencePolicy | None:
    folder = inputs.config.objective.kl_policy
    if folder is None:
        return None
    stored = load_compatible_policy(Path(folder), policy, "objective.kl_policy")
    data = inputs.data
    return ReferencePolicy(stored.to(data.device), data.items, inputs.config.training.item_chunk)


def _item_sharded(inputs: SetupInputs) -> TrainingSetup:
    config, data, workers = inputs.config, inputs.data, inputs.workers
    reward_model = inputs.reward_model
    if reward_model is not None and not isinstance(reward_model, FactoredRewardModel):
        raise ConfigError(
            "training.strategy=item_sharded needs a reward model whose items can be split: set "
            "reward_model.kind=factored"
        )
    if config.training.precision != "float32":
        raise ConfigError(
            "training.strategy=item_sharded sums gradients of embeddings over workers, in float32: "
            "set training.precision=float32 or training.strategy=replicated"
        )
    if config.training.warm_start is not None:
        raise ConfigError(
            "training.warm_start reads a policy over the whole catalogue: set "
            "training.strategy=replicated"
        )
    if data.validation is not None and (
        config.serving.mode == "top_k" or config.serving.top is not None
    ):
        raise ConfigError(
            "training.strategy=item_sharded cannot search the best items for validations: unset "
            "serving.top and serving.mode for training and set them afterwards, unset "
            "data.validation, or set training.strategy=replicated"
        )
    if data.validation is not None and config.serving.new_items is not None:
        raise ConfigError(
            "training.strategy=item_sharded has no sums over the new items for validations: unset "
            "serving.new_items for training and set it afterwards, unset data.validation, or set "
            "training.strategy=replicated"
        )
    shard = make_shard(config.policy, data, workers)
    seed_torch(config.seed, "policy")
    policy = sharded_policy(config.policy, data, shard, workers)
    if config.training.initialization == "uniform":
        initialize_uniform(policy)
    start: Start | None = None
    if config.incremental.from_run is not None:
        check_same_towers(policy, config)

        def start(optimizer: torch.optim.Optimizer) -> None:
            # Every worker maps the whole tables, and keeps its items' rows of them.
            whole = TwoTowerPolicy(config.policy, data.context_encoding, data.item_encoding)
            earlier = continue_run(config, data, whole, inputs.progress)
            rows_of = owned_table_rows(policy, shard)
            fill_from_whole(policy, whole, rows_of)
            earlier.fill_optimizer(optimizer, policy, rows_of)

    model = (
        None
        if reward_model is None
        else reward_model.with_items(data.items.on_same_device(shard.plain))
    )
    proposal = build_proposal(config, inputs.objective, data, policy, inputs.progress, shard.items)
    chunk = config.training.item_chunk
    owned = sorted(owned_weights(policy, shard).values())
    parameters = dict(policy.named_parameters())
    step = ShardedStep(
        policy,
        inputs.objective,
        shard,
        model,
        workers,
        item_chunk=chunk,
        sampled=None
        if proposal is None
        else ShardedSampledTerms(policy, shard, proposal, workers, config.sampling.exact_every),
        owned=[parameters[name] for name in owned],
        mean_row_weight=data.facts.mean_row_weight,
    )
    validate = _validator(
        inputs,
        model,
        lambda policy: ShardedScorer(
            policy, shard, workers, item_chunk=chunk, serving=config.serving
        ),
    )
    rows = OwnedRows(frozenset(owned), shard.size, shard.num_items)
    return TrainingSetup(config, data, step, validate, shard, rows, start)


def _validator(
    inputs: SetupInputs,
    reward_model: RewardModel | None,
    collective_scorer: Callable[[TwoTowerPolicy], RowScorer] | None = None,
) -> Validator | None:
    log = inputs.data.validation
    if log is None or log.schema.pscore is None:
        return None
    return Validator(
        inputs.data,
        inputs.config,
        reward_model,
        inputs.workers,
        collective_scorer,
    )


def uses_auto(config: Config, data: PreparedData) -> bool:
    """Whether the run chooses between candidates: objective.name=auto on a log with pscore.

    Raises:
        ConfigError: it is a log of slates, or its rows have weights.
    """
    if config.objective.name == "auto" and data.train.schema.slates:
        raise ConfigError(
            "objective.name=auto chooses between candidates by single draws, and the training log "
            "holds slates: name an objective, such as clipped_ips, clipped_dr or "
            "weighted_likelihood"
        )
    if config.objective.name == "auto" and data.train.schema.weight is not None:
        raise ConfigError(
            f"objective.name=auto has no form for rows with weights (column "
            f"'{data.train.schema.weight}'): name an objective, such as dr or clipped_ips"
        )
    return config.objective.name == "auto" and data.train.schema.pscore is not None


def checked_objective(config: Config, data: PreparedData) -> Objective:
    """Build the configured objective.

    Without propensities `auto` is regression (with them it is not an objective: see
    `offtower.training.auto`).

    Raises:
        ConfigError: other settings contradict it.
    """
    settings = config.objective
    name = "regression" if settings.name == "auto" else settings.name
    objective = make_objective(name, settings.arguments)
    if objective.requirements.policy == "two_stage":
        check_two_stage(objective, config, data)
    objective = objective.for_rewards(binary=data.facts.binary_reward)
    objective = objective.above(data.train.schema.reward_range[0])
    if max(settings.kl, settings.imitation, settings.entropy) > 0.0:
        if not objective.requirements.policy_terms:
            raise ConfigError(
                f"objective '{name}' has no policy terms that objective.kl, imitation or entropy "
                "could be added to"
            )
        objective = Regularized(
            objective,
            kl=settings.kl,
            imitation=settings.imitation,
            entropy=settings.entropy,
            exact_kl=settings.kl_policy is not None,
        )
    schema = data.train.schema
    if schema.slates and schema.pscore_kind is not None:
        objective = SlateObjective(objective, schema.pscore_kind, settings.interaction)
    elif settings.interaction != "auto":
        raise ConfigError(
            f"objective.interaction={settings.interaction} is for logs of slates; the training "
            "log's schema has no conditional or slate pscores"
        )
    check_terms(objective, config.training)
    check_start_and_temperature(config, objective)
    return objective
