"""Threads that run ahead: order, room, errors in their place, and an end."""

from __future__ import annotations

import gc
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offtower.data.read_ahead import ParallelReadAhead


def running() -> int:
    return sum(thread.name == "offtower-store" for thread in threading.enumerate())


def ended() -> bool:
    """Whether all threads are gone, after a moment."""
    for _ in range(1000):
        if not running():
            return True
        time.sleep(0.005)
    return False


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 12), max_size=40),
    threads=st.integers(1, 6),
    room=st.integers(0, 30),
)
def test_order_and_room(sizes: list[int], threads: int, room: int) -> None:
    """Results come in order; what is loaded and not given back fits, or is one alone."""
    lock, held, most = threading.Lock(), [0, 0], 0

    def load(number: int) -> int:
        nonlocal most
        with lock:
            held[0] += sizes[number]
            held[1] += 1
            if held[1] > 1:
                most = max(most, held[0])
        return number

    taken = []
    parts = ParallelReadAhead(
        load, range(len(sizes)), threads, str, 60.0, size=lambda n: sizes[n], room=room
    )
    for number in parts:
        taken.append(number)
        with lock:
            held[0] -= sizes[number]
            held[1] -= 1
    assert taken == list(range(len(sizes)))
    assert most <= room


def test_an_error_is_raised_in_order_and_stops_reading() -> None:
    begun: list[int] = []

    def load(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    found = ParallelReadAhead(load, range(1000), 4, str, 60.0)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(found)
    assert ended() and len(begun) < 40


def test_threads_end_when_the_iterator_is_dropped_or_closed() -> None:
    dropped = ParallelReadAhead(lambda n: n, range(1000), 4, str, 60.0)
    assert next(dropped) == 0
    assert running()
    del dropped
    gc.collect()
    assert ended()
    hang = threading.Event()
    closed = ParallelReadAhead(lambda n: hang.wait(), range(10), 2, str, 60.0)
    closer = threading.Timer(0.05, closed.close)
    closer.start()
    assert list(closed) == []  # Whoever waits is let go, whatever the store does.
    hang.set()
    assert ended()
