"""Threads that load the next pieces while the current one is in use."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from offtower.errors import DataError

logger = logging.getLogger("offtower.stores")

Loaded = TypeVar("Loaded")
T = TypeVar("T")

IN_FLIGHT = 2
"""The piece in use, and the next one."""


class ReadAhead(Generic[Loaded]):
    """Loads numbered pieces in a thread, at most two ahead of the consumer.

    Requesting the next piece releases the last one. An error of `load` is raised where the piece is
    requested. Leaving the `with` block ends the thread after the pieces that requests have allowed
    it to load: on several workers that load together they are the same ones.

    Args:
        numbers: of the pieces, in the order of use.
        load: returns a piece. The event is set when no more pieces are needed; `load` may then
            return None, and is not called again.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        load: Callable[[int, threading.Event], Loaded | None],
    ) -> None:
        self._numbers = numbers
        self._load = load
        self._stop = threading.Event()
        self._allowed = IN_FLIGHT
        self._changed = threading.Condition()
        self._loaded: SimpleQueue[Loaded | BaseException] = SimpleQueue()
        # A daemon, so that the interpreter can exit in the middle of an epoch.
        self._thread = threading.Thread(target=self._run, name="offtower-reader", daemon=True)

    def __enter__(self) -> ReadAhead[Loaded]:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        # The garbage collector may call this in the thread itself.
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __iter__(self) -> Iterator[Loaded]:
        for _ in self._numbers:
            yield self._next()
            with self._changed:
                self._allowed += 1
                self._changed.notify_all()

    def _next(self) -> Loaded:
        loaded = self._loaded.get()
        if isinstance(loaded, BaseException):
            raise loaded
        return loaded

    def _run(self) -> None:
        try:
            for turn, number in enumerate(self._numbers):
                with self._changed:
                    while turn >= self._allowed and not self._stop.is_set():
                        self._changed.wait()
                    allowed = turn < self._allowed
                piece = self._load(number, self._stop) if allowed else None
                if piece is None:
                    return
                self._loaded.put(piece)
                del piece
        except BaseException as error:
            self._loaded.put(error)


WARN_AFTER_SECONDS = 15.0
"""Seconds of waiting for a piece before the first warning; later ones come each minute."""
_WARN_EVERY_SECONDS = 60.0


class ParallelReadAhead(Iterator[Loaded]):
    """Iterates over load(part) in order, with several threads that run ahead.

    Requesting the next result releases the last one. The threads are daemons: one that hangs blocks
    neither the caller nor the interpreter. They start at the first request, and end after their
    current part when the iterator is closed or dropped.

    Args:
        load: called in any order, by several threads at once.
        threads: parts loaded at the same time.
        name: of a part, for messages.
        seconds: longest wait for a part.
        size: of a part's result; results that are loaded and not released have at most `room`
            together, except for a single larger one.

    Raises:
        DataError: a part took too long. Otherwise the error of `load`, of the first part in order.
    """

    def __init__(
        self,
        load: Callable[[T], Loaded],
        parts: Sequence[T],
        threads: int,
        name: Callable[[T], str],
        seconds: float,
        *,
        size: Callable[[T], float] | None = None,
        room: float = 0.0,
    ) -> None:
        # The threads reference the run and not this object, so that dropping it ends them.
        self._run: _Run[Any, Loaded] = _Run(load, parts, size, room, 4 * threads)
        self._parts, self._threads = parts, threads
        self._name, self._seconds = name, seconds
        self._number = 0

    def __next__(self) -> Loaded:
        number = self._number
        if number == 0:
            self._run.start(self._threads)
        else:
            self._run.release(number - 1)
        if number == len(self._parts):
            self.close()
            raise StopIteration
        self._number += 1
        try:
            return self._run.result(number, self._name(self._parts[number]), self._seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads; may be called while another thread waits for a result."""
        self._run.stop()

    def __del__(self) -> None:
        self.close()


class _Run(Generic[T, Loaded]):
    """State shared by the threads."""

    def __init__(
        self,
        load: Callable[[T], Loaded],
        parts: Sequence[T],
        size: Callable[[T], float] | None,
        room: float,
        most: int,
    ) -> None:
        self._load, self._parts, self._size, self._room = load, parts, size, room
        self._most = len(parts) if size is not None else most
        self._started = self._returned = 0
        self._held = 0.0
        self._done: dict[int, tuple[Loaded | None, BaseException | None]] = {}
        self._stopped = False
        self._changed = threading.Condition()

    def start(self, threads: int) -> None:
        for _ in range(min(threads, len(self._parts))):
            threading.Thread(target=self._work, name="offtower-store", daemon=True).start()

    def result(self, number: int, name: str, seconds: float) -> Loaded:
        began = time.monotonic()
        warn_at = WARN_AFTER_SECONDS
        with self._changed:
            while number not in self._done:
                if self._stopped:
                    raise StopIteration
                waited = time.monotonic() - began
                if waited >= seconds:
                    raise DataError(
                        f"no answer for {waited:.0f} s: {name}. The store or the network hangs; "
                        "OFFTOWER_STORE_TIMEOUT=SECONDS in the environment allows more"
                    )
                if waited >= warn_at:
                    logger.warning("waiting for %s, for %.0f s now", name, waited)
                    warn_at += _WARN_EVERY_SECONDS
                self._changed.wait(min(warn_at, seconds) - waited)
            loaded, error = self._done.pop(number)
        if error is not None:
            raise error
        return loaded  # type: ignore[return-value]

    def release(self, number: int) -> None:
        with self._changed:
            self._returned += 1
            self._held -= self._size_of(number)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._done.clear()
            self._changed.notify_all()

    def _size_of(self, number: int) -> float:
        return 0.0 if self._size is None else self._size(self._parts[number])

    def _may_start(self) -> bool:
        ahead = self._started - self._returned
        fits = self._held + self._size_of(self._started) <= self._room
        return ahead == 0 or (fits and ahead < self._most)

    def _work(self) -> None:
        while True:
            with self._changed:
                while (
                    not self._stopped and self._started < len(self._parts) and not self._may_start()
                ):
                    self._changed.wait()
                if self._stopped or self._started == len(self._parts):
                    return
                number = self._started
                self._started += 1
                self._held += self._size_of(number)
            loaded, error = None, None
            try:
                loaded = self._load(self._parts[number])
            except BaseException as raised:
                error = raised
            with self._changed:
                if not self._stopped:
                    self._done[number] = (loaded, error)
                self._changed.notify_all()
            # Hold no reference to a released result.
            del loaded, error
