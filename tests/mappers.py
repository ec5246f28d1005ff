"""A mapper that does what can happen to parts on a cluster, in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from offtower.execution import Execution
from offtower.mapping import Mapper

T = TypeVar("T")
R = TypeVar("R")


class BackwardsMapper(Mapper):
    """Runs the last part first, and every part twice, as workers may, whose results get lost; the
    function and the results are pickled, as they are on their way."""

    workers = 5
    distributed = True

    def map(
        self,
        function: Callable[[T], R],
        parts: Sequence[T],
        task: str = "",
        *,
        on_lost: Callable[[T, Exception], R] | None = None,
    ) -> Iterator[R]:
        done: dict[int, R | Exception] = {}
        for number in [*reversed(range(len(parts))), *range(len(parts))]:
            try:
                done[number] = _sent(_sent(function)(parts[number]))
            except ValueError as error:
                done[number] = _sent(error)
        for number in range(len(parts)):
            result = done[number]
            if isinstance(result, Exception):
                raise result
            yield result


BACKWARDS = Execution(BackwardsMapper())


def _sent(value: T) -> T:
    return pickle.loads(pickle.dumps(value))


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
