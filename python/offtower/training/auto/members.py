"""Fit the members of a candidate: one policy per fold, on the rows outside the fold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from offtower.config import Config, TrainingConfig
from offtower.crossfit.loop import FitPlan, FitStep, FoldModel, ModelLoss, fit_out_of_fold
from offtower.data.order import EpochOrder
from offtower.data.reader import Step
from offtower.errors import RunError
from offtower.models.optimizer import finish_updates, make_optimizer
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.sampling import ItemCounts
from offtower.seeds import derive_seed, seed_torch
from offtower.training.auto.candidates import PolicyCandidate, Schedule
from offtower.training.auto.folds import Folds
from offtower.training.auto.kept_rows import KeptRows
from offtower.training.sampled import SampledTerms, build_proposal
from offtower.training.schedule import LearningRate
from offtower.training.step import ReplicatedStep, StepKey, TrainedPolicy


@dataclass(frozen=True)
class FitStart:
    """What a fit begins with, where it is not the first of its members or not on the whole log."""

    stage: int = 0
    """Fits of the same members before this one; part of the keys of random streams."""
    weights: Sequence[Mapping[str, Tensor]] | None = None
    """Of the members; the optimizer starts anew (warm restarts, Loshchilov and Hutter 2017). None
    draws them."""
    kept: KeptRows | None = None
    """The rows to fit on; None reads the log."""
    counts: ItemCounts | None = None
    """Of the logged items in those rows, for sampled terms; None counts them."""
    mean_score: float | None = None
    """Score that the item bias of new members begins with; None draws it. Steps of a bounded
    learning rate need hundreds of them to reach the mean of a rare reward."""


def fit_members(
    candidate: PolicyCandidate,
    config: Config,
    data: PreparedData,
    folds: Folds,
    schedule: Schedule,
    progress: Progress,
    start: FitStart = FitStart(),
) -> list[TwoTowerPolicy]:
    """Fit all members in one pass over the log per epoch; each batch has rows of one fold.

    Members differ in their rows and their initial weights, so their mean is an ensemble.

    Raises:
        RunError: a loss is not finite.
    """
    seed = config.seed
    members = [
        start_member(candidate, config, data, fold, progress, start.counts)
        for fold in folds.held_out
    ]
    for member, weights in zip(members, start.weights or (), strict=False):
        member.step.policy.load_state_dict(dict(weights))
    if start.weights is None and start.mean_score is not None:
        for member in members:
            set_item_bias(member.step.policy, start.mean_score)
    stage = (start.stage,) if start.stage else ()
    source = data if start.kept is None else start.kept
    sizes = data.train.row_group_sizes if start.kept is None else start.kept.row_group_sizes
    order = EpochOrder(
        sizes,
        schedule.batch_size,
        seed=derive_seed(seed, "auto order", *stage),
        window_rows=config.data.window_rows,
        num_folds=folds.number,
    )
    plan = FitPlan(
        order,
        folds.of,
        schedule.epochs,
        seed,
        label=f"fitting {candidate.name}",
        stream=" ".join(["auto", candidate.name, "step", *map(str, stage)]),
        steps=schedule.steps,
    )

    def losses(at: FitStep) -> ModelLoss | None:
        batch = at.batch
        cursor = batch.cursor
        draws = derive_seed(seed, "auto draws", *stage, cursor.epoch, cursor.window, cursor.batch)
        if candidate.objective.requirements.rewarded_rows_only:
            # At one reward in a hundred rows this saves nearly all of a step's time.
            rows = batch.rows.take(np.flatnonzero(batch.rows.reward))
            batch = Step(cursor, rows, batch.fold, joined=batch.joined)
        if len(batch.rows) == 0:
            return None

        def loss_of(index: int) -> Tensor:
            members[index].rate.at(at.progress)
            loss = members[index].step.loss(batch, key=StepKey(at.number, draws))[0].loss
            if not math.isfinite(float(loss.detach())):
                raise RunError(
                    f"candidate '{candidate.name}' of objective=auto gave a loss of "
                    f"{float(loss.detach())} in step {at.number + 1}; look for extreme features or "
                    "propensities with 'offtower validate', or remove the candidate from "
                    "auto.candidates"
                )
            return loss

        return loss_of

    fit_out_of_fold(source, plan, [member.model for member in members], losses, progress)
    return [member.finish() for member in members]


@dataclass(frozen=True)
class MemberFit:
    """A member in training."""

    step: ReplicatedStep
    model: FoldModel
    rate: LearningRate

    def finish(self) -> TwoTowerPolicy:
        finish_updates(self.model.optimizer)
        if self.step.proposal is not None:
            self.step.proposal.close()
        return self.step.policy.eval().requires_grad_(False)


@torch.no_grad()
def set_item_bias(policy: TwoTowerPolicy, score: float) -> None:
    """Add `score` to the biases of all items; does nothing for a user's module."""
    width = policy.config.embedding_dim + 1
    last = [
        layer
        for layer in policy.item_tower.modules()
        if isinstance(layer, nn.Linear) and layer.out_features == width
    ]
    if last and last[-1].bias is not None:
        last[-1].bias[-1] += score


def start_member(
    candidate: PolicyCandidate,
    config: Config,
    data: PreparedData,
    fold: int,
    progress: Progress,
    counts: ItemCounts | None = None,
) -> MemberFit:
    """Draw the initial weights of a member; `counts` as for `FitStart`."""
    seed_torch(config.seed, f"auto {candidate.name}", fold)
    policy = TwoTowerPolicy(candidate.policy, data.context_encoding, data.item_encoding)
    policy.to(data.device).train()
    proposal = build_proposal(config, candidate.objective, data, policy, progress, counts=counts)
    step = ReplicatedStep(
        TrainedPolicy(policy, data.items),
        candidate.objective,
        None,
        item_chunk=config.training.item_chunk,
        sampled=None
        if proposal is None
        else SampledTerms(policy, data.items, proposal, config.sampling.exact_every),
    )
    optimizer = make_optimizer(
        "adamw",
        policy,
        candidate.learning_rate,
        candidate.weight_decay,
        # Without a proposal, steps of sampled runs touch only the items of the batch.
        "dense"
        if config.training.terms == "exact" or candidate.objective.requirements.square_sum
        else "lazy_adamw",
    )
    rate = LearningRate(TrainingConfig(warm_up=0.05, decay="linear"), optimizer)
    return MemberFit(step, FoldModel(optimizer, held_out=fold, stream=fold), rate)
