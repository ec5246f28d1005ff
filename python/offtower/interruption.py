"""Requests from outside to end a long function early, after it has saved its work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """Never interrupts; subclasses do.

    Attributes:
        has_notices: whether `preempted` can become true.
    """

    has_notices = False

    def stop_requested(self) -> bool:
        """Whether to save and stop, by what this process knows; called at every step."""
        return False

    def preempted(self) -> bool:
        """Whether a worker's node is about to be taken away; collective."""
        return False

    def ends_after(self, epochs: int) -> bool:
        """Whether to save and stop when so many epochs are complete; alike on all workers."""
        return False

    @contextmanager
    def deferred(self, can_save: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Let the block save its work before it stops.

        Args:
            can_save: asked at a request; where it is false, the request ends the block at once.
        """
        yield


class EpochLimit(Interruption):
    """Stops training when `epochs` are complete, without a change of its schedules."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def ends_after(self, epochs: int) -> bool:
        return epochs >= self._epochs


class Terminated(KeyboardInterrupt):
    """SIGTERM where nothing has to be saved first."""


class TerminationSignal(Interruption):
    """SIGTERM as a request to stop; `Terminated` is raised where no block is `deferred`, and by a
    second signal."""

    def __init__(self) -> None:
        self._requested = False
        self._can_save: Callable[[], bool] | None = None

    def stop_requested(self) -> bool:
        return self._requested

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGTERM until the block ends; in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def deferred(self, can_save: Callable[[], bool] = lambda: True) -> Iterator[None]:
        # Installed again, since libraries such as Ray set handlers of their own.
        with self.installed():
            self._can_save = can_save
            try:
                yield
            finally:
                self._can_save = None

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        can_save = not self._requested and self._can_save is not None and self._can_save()
        self._requested = True
        if not can_save:
            raise Terminated
