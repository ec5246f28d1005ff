"""The training loop of models that are fitted out of fold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offtower.data.order import EpochOrder
from offtower.data.reader import FoldOf, Step
from offtower.progress import Progress
from offtower.seeds import seed_torch


@dataclass(frozen=True)
class FitPlan:
    """The passes over the log that all models share."""

    order: EpochOrder
    fold: FoldOf | None
    """Fold of each row; None where there is one fold."""
    epochs: int
    seed: int
    label: str
    """Shown with the progress."""
    stream: str
    """Name of the random stream of the steps."""
    steps: int | None = None
    """The fit ends after this many batches; None reads all epochs."""


class EpochReader(Protocol):
    """Reads epochs in batches."""

    def epoch(self, epoch: int) -> Iterator[Step]: ...


class BatchSource(Protocol):
    """Rows in shuffled batches: a log, or rows in memory."""

    def batches(
        self, order: EpochOrder, fold: FoldOf | None = None
    ) -> AbstractContextManager[EpochReader]: ...


@dataclass(frozen=True)
class FoldModel:
    """One of several models that are fitted side by side."""

    optimizer: torch.optim.Optimizer
    held_out: int | None
    """Fold whose rows the model does not see; None for a model that sees all rows."""
    stream: int
    """Number of the model in the random stream of the steps."""


@dataclass(frozen=True)
class FitStep:
    """A batch and its position in the fit."""

    batch: Step
    number: int
    """Steps before this one."""
    progress: float
    """Share of the fit before this step, in [0, 1)."""


ModelLoss = Callable[[int], Tensor]
"""Index of a model -> its loss on the batch."""


def fit_out_of_fold(
    data: BatchSource,
    plan: FitPlan,
    models: Sequence[FoldModel],
    losses: Callable[[FitStep], ModelLoss | None],
    progress: Progress,
) -> None:
    """Fit each model on the rows outside its fold, in one pass over the log per epoch.

    A model's updates depend only on its seeds and its rows, so models that are fitted one at a
    time get the same bits as models that are fitted together.

    Args:
        losses: prepares what the models share of a batch, and returns the loss of each; None skips
            the batch.
    """
    rows = plan.epochs * plan.order.num_rows
    done = number = 0
    progress.start(plan.label, rows if plan.steps is None else plan.steps)
    with data.batches(plan.order, plan.fold) as reader:
        for epoch in range(plan.epochs):
            if number == plan.steps:
                break
            for batch in reader.epoch(epoch):
                if number == plan.steps:
                    break
                at = (epoch, batch.cursor.window, batch.cursor.batch)
                share = done / rows if plan.steps is None else number / plan.steps
                loss_of = losses(FitStep(batch, number, share))
                for index, model in enumerate(models):
                    if loss_of is None or model.held_out == batch.fold:
                        continue
                    seed_torch(plan.seed, plan.stream, model.stream, *at)
                    loss = loss_of(index)
                    model.optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    model.optimizer.step()
                done += batch.batch_rows
                number += 1
                progress.advance(batch.batch_rows if plan.steps is None else 1)
    progress.finish()
