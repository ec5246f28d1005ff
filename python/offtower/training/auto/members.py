"""Fit the members of a candidate: one policy per fold, on the rows outside the fold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from offtower.config import Config, TrainingConfig
from offtower.crossfit.loop import FitPlan, FitStep, FoldModel, ModelLoss, fit_out_of_fold
from offtower.data.order import EpochOrder
from offtower.data.reader import Step
from offtower.errors import RunError
from offtower.models.optimizer import finish_updates, make_optimizer
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed, seed_torch
from offtower.training.auto.candidates import PolicyCandidate, Schedule
from offtower.training.auto.folds import Folds
from offtower.training.sampled import SampledTerms, build_proposal
from offtower.training.schedule import LearningRate
from offtower.training.step import ReplicatedStep, StepKey, TrainedPolicy


def fit_members(
    candidate: PolicyCandidate,
    config: Config,
    data: PreparedData,
    folds: Folds,
    schedule: Schedule,
    progress: Progress,
) -> list[TwoTowerPolicy]:
    """Fit all members in one pass over the log per epoch; each batch has rows of one fold.

    Members differ in their rows and their initial weights, so their mean is an ensemble.

    Raises:
        RunError: a loss is not finite.
    """
    seed = config.seed
    members = [_start_member(candidate, config, data, fold, progress) for fold in folds.held_out]
    order = EpochOrder(
        data.train.row_group_sizes,
        schedule.batch_size,
        seed=derive_seed(seed, "auto order"),
        window_rows=config.data.window_rows,
        num_folds=folds.number,
    )
    plan = FitPlan(
        order,
        folds.of,
        schedule.epochs,
        seed,
        label=f"fitting {candidate.name}",
        stream=f"auto {candidate.name} step",
    )

    def losses(at: FitStep) -> ModelLoss | None:
        batch = at.batch
        cursor = batch.cursor
        draws = derive_seed(seed, "auto draws", cursor.epoch, cursor.window, cursor.batch)
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

    fit_out_of_fold(data, plan, [member.model for member in members], losses, progress)
    return [member.finish() for member in members]


@dataclass(frozen=True)
class _Member:
    step: ReplicatedStep
    model: FoldModel
    rate: LearningRate

    def finish(self) -> TwoTowerPolicy:
        finish_updates(self.model.optimizer)
        if self.step.proposal is not None:
            self.step.proposal.close()
        return self.step.policy.eval().requires_grad_(False)


def _start_member(
    candidate: PolicyCandidate, config: Config, data: PreparedData, fold: int, progress: Progress
) -> _Member:
    seed_torch(config.seed, f"auto {candidate.name}", fold)
    policy = TwoTowerPolicy(candidate.policy, data.context_encoding, data.item_encoding)
    policy.to(data.device).train()
    proposal = build_proposal(config, candidate.objective, data, policy, progress)
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
        "dense" if proposal is None else "lazy_adamw",
    )
    rate = LearningRate(TrainingConfig(warm_up=0.05, decay="linear"), optimizer)
    return _Member(step, FoldModel(optimizer, held_out=fold, stream=fold), rate)
