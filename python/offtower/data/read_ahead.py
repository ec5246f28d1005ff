"""One thread that loads what is wanted next while the current piece is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

Loaded = TypeVar("Loaded")

IN_FLIGHT = 2
"""The piece that is in use, and the next one."""


class ReadAhead(Generic[Loaded]):
    """Loads numbered pieces in a thread, never more than two that were not given back.

    Iterating asks for the next piece, and by that gives the last one back. An error of `load` is
    raised where the piece was asked for. Leaving the `with` block ends the thread.

    Args:
        numbers: the pieces, in the order in which they are wanted.
        load: number -> piece. The event is set when nobody wants pieces any more; `load` may then
            return None early.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        load: Callable[[int, threading.Event], Loaded | None],
    ) -> None:
        self._numbers = numbers
        self._load = load
        self._stop = threading.Event()
        self._permits = threading.Semaphore(IN_FLIGHT)
        self._loaded: SimpleQueue[Loaded | BaseException] = SimpleQueue()
        # A daemon: an interpreter that exits in the middle of an epoch does not wait for it.
        self._thread = threading.Thread(target=self._run, name="offtower-reader", daemon=True)

    def __enter__(self) -> ReadAhead[Loaded]:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._permits.release()
        # The garbage collector may run this in the thread itself.
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __iter__(self) -> Iterator[Loaded]:
        for _ in self._numbers:
            yield self._next()
            self._permits.release()

    def _next(self) -> Loaded:
        loaded = self._loaded.get()
        if isinstance(loaded, BaseException):
            raise loaded
        return loaded

    def _run(self) -> None:
        try:
            for number in self._numbers:
                self._permits.acquire()
                piece = None if self._stop.is_set() else self._load(number, self._stop)
                if piece is None:
                    return
                self._loaded.put(piece)
                del piece
        except BaseException as error:
            self._loaded.put(error)
