"""When to write a checkpoint, and when to stop: decided after each step, alike on all workers."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from offtower.interruption import Interruption
from offtower.training.checkpoints.store import CheckpointStore
from offtower.training.workers import Workers

_ASK_SECONDS = 5.0
"""Between two questions whether a node is about to be taken away."""
_PREEMPTED_SECONDS = 10.0
"""Largest time between checkpoints from such a notice on."""


@dataclass(frozen=True)
class Due:
    """What to do after a step."""

    save: bool
    stop: bool


class CheckpointTimes:
    """Decides by the clock of the first worker and by the interruptions of all.

    Args:
        every_seconds: between two checkpoints.
        store: None writes no checkpoints.
        workers: ask together.
        interruption: of this worker.
    """

    def __init__(
        self,
        every_seconds: float,
        store: CheckpointStore | None,
        workers: Workers,
        interruption: Interruption,
    ) -> None:
        self._every, self._store, self._workers = every_seconds, store, workers
        self._interruption = interruption
        self._saved = self._asked = time.monotonic()
        self._preempted = False

    def restart(self) -> None:
        """Count the seconds from now: a checkpoint was begun, or is not due yet."""
        self._saved = time.monotonic()

    def after_step(self) -> Due:
        """Decide; also commits the previous checkpoint once all workers have written it.

        Collective.
        """
        now, workers, store = time.monotonic(), self._workers, self._store
        save = store is not None and now - self._saved > self._every
        stop = self._interruption.stop_requested()
        ask = self._interruption.has_notices and now - self._asked > _ASK_SECONDS
        if workers.size > 1 and store is not None:
            first = workers.first
            flags = torch.tensor(
                [save and first, ask and first, stop, store.written],
                dtype=torch.float32,
                device="cpu",
            )
            begin, ask_all, stop_any, written = workers.sum(flags).tolist()
            if written == workers.size:
                store.finish()
            save, ask, stop = begin > 0, ask_all > 0, stop_any > 0
        if ask:
            self._asked = now
            if not self._preempted and self._interruption.preempted():
                self._preempted, save = True, store is not None
                self._every = min(self._every, _PREEMPTED_SECONDS)
        return Due(save, stop)
