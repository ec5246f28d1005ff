"""A candidate's members: one policy for each fold, which learns from all rows but the fold's."""

from __future__ import annotations

import math

import numpy as np

from offtower.config import Config, TrainingConfig
from offtower.data.order import EpochOrder
from offtower.data.reader import BatchReader, Step
from offtower.errors import RunError
from offtower.models.optimizer import finish_updates, make_optimizer
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed, seed_torch
from offtower.training.auto.candidates import Candidate, Schedule
from offtower.training.auto.folds import Folds
from offtower.training.sampled import SampledTerms, build_proposal
from offtower.training.schedule import LearningRate
from offtower.training.step import StepPlace, TrainingStep


def fit_members(
    candidate: Candidate,
    config: Config,
    data: PreparedData,
    folds: Folds,
    schedule: Schedule,
    progress: Progress,
) -> list[TwoTowerPolicy]:
    """One pass over the log an epoch for all members; a batch has rows of one fold.

    Members differ in their rows and in their starts, so that their mean is an ensemble's.

    Raises:
        RunError: a loss is not finite.
    """
    seed = config.seed
    members: list[_Member] = []
    for fold in folds.held_out:
        seed_torch(seed, f"auto {candidate.name}", fold)
        policy = TwoTowerPolicy(candidate.policy, data.context_encoding, data.item_encoding)
        members.append(_Member(policy, candidate, config, data, fold, progress))
    order = EpochOrder(
        data.train.row_group_sizes,
        schedule.batch_size,
        seed=derive_seed(seed, "auto order"),
        window_rows=config.data.window_rows,
        num_folds=folds.number,
    )
    reader = BatchReader(
        data.train,
        data.catalogue,
        data.context_encoding,
        order,
        fold=folds.of,
        on_bad_rows=data.on_bad_rows,
        quarantine=data.quarantine_of("train"),
    )
    total = schedule.epochs * data.train.num_rows
    done = step = 0
    progress.start(f"learning {candidate.name}", total)
    with reader:
        for epoch in range(schedule.epochs):
            for batch in reader.epoch(epoch):
                place = (epoch, batch.cursor.window, batch.cursor.batch)
                count = batch.batch_rows
                if candidate.objective.needs_rewarded_rows_only:
                    # At a click in a hundred rows this is nearly all of a step's time.
                    rows = batch.rows.take(np.flatnonzero(batch.rows.reward))
                    batch = Step(batch.cursor, rows, batch.fold, joined=batch.joined)
                for member in members:
                    if member.fold == batch.fold or len(batch.rows) == 0:
                        continue
                    seed_torch(seed, f"auto {candidate.name} step", member.fold, *place)
                    draw = StepPlace(step, derive_seed(seed, "auto draws", *place))
                    member.rate.at(done / total)
                    result, _ = member.step.loss(batch, place=draw)
                    if not math.isfinite(float(result.loss.detach())):
                        raise RunError(
                            f"candidate '{candidate.name}' of objective=auto gave a loss of "
                            f"{float(result.loss.detach())} in step {step + 1}; look for extreme "
                            "features or propensities with 'offtower validate', or leave the "
                            "candidate out of auto.candidates"
                        )
                    member.optimizer.zero_grad(set_to_none=True)
                    result.loss.backward()
                    member.optimizer.step()
                done += count
                step += 1
                progress.advance(count)
    progress.finish()
    return [member.finish() for member in members]


class _Member:
    def __init__(
        self,
        policy: TwoTowerPolicy,
        candidate: Candidate,
        config: Config,
        data: PreparedData,
        fold: int,
        progress: Progress,
    ) -> None:
        self.fold = fold
        self.policy = policy.to(data.device).train()
        self._proposal = build_proposal(config, candidate.objective, data, policy, progress)
        sampled = (
            None
            if self._proposal is None
            else SampledTerms(policy, data.items, self._proposal, config.sampling.exact_every)
        )
        self.step = TrainingStep(
            policy, candidate.objective, data.items, None, config.training.item_chunk, sampled
        )
        self.optimizer = make_optimizer(
            "adamw",
            policy,
            candidate.learning_rate,
            candidate.weight_decay,
            "dense" if self._proposal is None else "lazy_adamw",
        )
        self.rate = LearningRate(TrainingConfig(warm_up=0.05, decay="linear"), self.optimizer)

    def finish(self) -> TwoTowerPolicy:
        finish_updates(self.optimizer)
        if self._proposal is not None:
            self._proposal.close()
        return self.policy.eval().requires_grad_(False)
