"""What steps gave, read from the device they ran on: at once from a CPU, together from a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offtower.errors import RunError
from offtower.training.epoch import EpochSums

_TOGETHER = 64
"""Steps of a GPU whose numbers are read in one go; the host may be as far ahead of it."""


@dataclass(frozen=True)
class _Reading:
    step: int
    epoch: int
    rows: int
    loss: Tensor
    value: Tensor
    norm: Tensor | None


@dataclass(frozen=True)
class StepNumbers:
    """Of one step, as the metrics have them."""

    loss: float
    value: float
    gradient_norm: float | None


class Readings:
    """Adds the numbers of steps to an epoch's sums, and ends a run whose numbers are none.

    On a CPU every step is read when it is done. To read a step of a GPU is to wait for it, so steps
    are kept and read together: whenever somebody asks, and every so many steps. Nothing is written
    before `read` was called, so no checkpoint has what came after a step without a finite loss.

    Args:
        sums: of the epoch under way.
    """

    def __init__(self, sums: EpochSums) -> None:
        self.last: StepNumbers | None = None
        """The newest step that was read."""
        self._sums = sums
        self._waiting: list[_Reading] = []

    def add(
        self, step: int, epoch: int, rows: int, loss: Tensor, value: Tensor, norm: Tensor | None
    ) -> None:
        """A step was computed; its weights may or may not be updated yet.

        Args:
            step, epoch: counted from 1, for the message.
            rows: of the step, over all workers.
            loss, value, norm: scalars.

        Raises:
            RunError: as `read`.
        """
        self._waiting.append(_Reading(step, epoch, rows, loss, value, norm))
        if not loss.is_cuda or len(self._waiting) >= _TOGETHER:
            self.read()

    def read(self) -> None:
        """Read all that wait.

        Raises:
            RunError: a loss or a gradient norm was not finite; the first such step is named.
        """
        waiting, self._waiting = self._waiting, []
        for one, numbers in zip(waiting, _numbers(waiting), strict=True):
            loss, norm = numbers.loss, numbers.gradient_norm
            if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
                raise RunError(
                    f"step {one.step} (epoch {one.epoch}) gave a loss of {loss} and a gradient "
                    f"norm of {norm}. The last checkpoint is whole. Lower training.learning_rate, "
                    "clip weights (objective.name=clipped_ips or clipped_dr), or look for extreme "
                    "features with 'offtower validate'"
                )
            self._sums.add(one.rows, loss, numbers.value)
            self.last = numbers


def _numbers(readings: list[_Reading]) -> list[StepNumbers]:
    if readings and readings[0].loss.is_cuda:
        # One copy for all; float64 keeps every bit of what each of them is.
        columns = [
            torch.stack([x.double() for x in (r.loss, r.value, r.norm) if x is not None])
            for r in readings
        ]
        rows = torch.stack(columns).cpu().tolist()
        return [StepNumbers(row[0], row[1], row[2] if len(row) > 2 else None) for row in rows]
    return [
        StepNumbers(float(r.loss), float(r.value), None if r.norm is None else float(r.norm))
        for r in readings
    ]
