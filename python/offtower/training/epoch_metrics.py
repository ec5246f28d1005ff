"""Metrics of training steps, read from the device and summed over an epoch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from offtower.errors import RunError
from offtower.training.step import StepDiagnostics

_MAX_PENDING = 64
"""Steps on a GPU that are read in one transfer; the host may run that far ahead."""


@dataclass
class EpochSums:
    """Sums over the rows of an epoch so far; stored in checkpoints."""

    rows: float = 0
    loss: float = 0.0
    value: float = 0.0
    seconds: float = 0.0
    seconds_waiting: float = 0.0
    last: dict[str, float | None] | None = None
    """Diagnostics of the epoch's last batch."""

    @classmethod
    def restore(cls, content: dict[str, Any] | None) -> EpochSums:
        return cls(**content) if content else cls()

    def add(self, rows: int, loss: float, value: float) -> None:
        self.rows += rows
        self.loss += loss * rows
        self.value += value * rows

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.rows, 1)

    @property
    def mean_value(self) -> float:
        return self.value / max(self.rows, 1)


def diagnostics_line(diagnostics: StepDiagnostics | None) -> dict[str, float | None]:
    """Names and numbers for a metrics line; `divergence` only where there is a reference policy."""
    line = asdict(diagnostics or StepDiagnostics(None, None, None))
    if line["divergence"] is None:
        line.pop("divergence")
    return line


@dataclass(frozen=True)
class _PendingStep:
    step: int
    epoch: int
    rows: int
    loss: Tensor
    value: Tensor
    norm: Tensor | None


@dataclass(frozen=True)
class StepMetrics:
    """Numbers of one step."""

    loss: float
    value: float
    gradient_norm: float | None


class StepMetricsQueue:
    """Adds the numbers of steps to an epoch's sums and stops a run that diverges.

    On a CPU every step is read at once. Reading from a GPU waits for it, so its steps are queued
    and read together. Callers read the queue before they write metrics or checkpoints, so no
    checkpoint holds weights from after a step with a loss that is not finite.

    Args:
        sums: of the current epoch.
    """

    def __init__(self, sums: EpochSums) -> None:
        self.last: StepMetrics | None = None
        """The newest step that was read."""
        self._sums = sums
        self._pending: list[_PendingStep] = []

    def add(
        self, step: int, epoch: int, rows: int, loss: Tensor, value: Tensor, norm: Tensor | None
    ) -> None:
        """Queue a step.

        Args:
            step, epoch: counted from 1, for the message.
            rows: of the step, over all workers.
            loss, value, norm: scalars.

        Raises:
            RunError: as `read`.
        """
        self._pending.append(_PendingStep(step, epoch, rows, loss, value, norm))
        if not loss.is_cuda or len(self._pending) >= _MAX_PENDING:
            self.read()

    def read(self) -> None:
        """Read all queued steps.

        Raises:
            RunError: a loss or a gradient norm is not finite; names the first such step.
        """
        pending, self._pending = self._pending, []
        for one, metrics in zip(pending, _transferred(pending), strict=True):
            loss, norm = metrics.loss, metrics.gradient_norm
            if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
                raise RunError(
                    f"step {one.step} (epoch {one.epoch}) gave a loss of {loss} and a gradient "
                    f"norm of {norm}. The last checkpoint is intact. Lower training.learning_rate, "
                    "clip weights (objective.name=clipped_ips or clipped_dr), or look for extreme "
                    "features with 'offtower validate'"
                )
            self._sums.add(one.rows, loss, metrics.value)
            self.last = metrics


def _transferred(steps: list[_PendingStep]) -> list[StepMetrics]:
    if steps and steps[0].loss.is_cuda:
        # One transfer for all; float64 represents each of them exactly.
        columns = [
            torch.stack([x.double() for x in (s.loss, s.value, s.norm) if x is not None])
            for s in steps
        ]
        rows = torch.stack(columns).cpu().tolist()
        return [StepMetrics(row[0], row[1], row[2] if len(row) > 2 else None) for row in rows]
    return [
        StepMetrics(float(s.loss), float(s.value), None if s.norm is None else float(s.norm))
        for s in steps
    ]
