"""Long passes as a function of a part and a merge of the results.

`Mapper` applies a function to parts (row groups, batches, a file to write) and returns the results
in order; the one in `offtower.jobs` does so on Ray. Floating-point sums are merged in one fixed
tree (`merge_all`), so that their bits do not depend on the number of parts and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, Self, TypeVar

from offtower.errors import OfftowerError

T = TypeVar("T")
R = TypeVar("R")


class Mapper:
    """Applies a function to parts one after the other, in this process.

    Attributes:
        workers: parts that run at the same time.
        distributed: whether parts run in other processes, which is when two short parallel passes
            are better than a long one, and files must go to shared storage.
        gpus: of each part, where it is distributed.
    """

    workers: int = 1
    distributed: bool = False
    gpus: float = 0.0

    def map(
        self,
        function: Callable[[T], R],
        parts: Sequence[T],
        task: str = "",
        *,
        on_lost: Callable[[T, Exception], R] | None = None,
    ) -> Iterator[R]:
        """Yield function(part) in the order of `parts`.

        Args:
            function: may be sent to another process, and may run twice on a part whose worker
                died; the files that it writes must be the same then, and written atomically.
            parts: small; sent with each call.
            task: names the pass in messages.
            on_lost: the result of a part whose worker died, or ran out of memory, each time; by
                default that is an error.

        Raises:
            OfftowerError, OSError: the function's, of the first part in order that failed.
        """
        for part in parts:
            yield function(part)


class Mergeable(Protocol):
    """Sums over rows that merge."""

    def merge(self, other: Self) -> Self: ...


M = TypeVar("M", bound=Mergeable)


class MergeTree(Generic[M]):
    """Merges sums one by one, in a balanced tree whose shape depends on their number only.

    Ranges of a power of two sums (`pieces`) can be merged separately: merging their results gives
    the same tree, and so the same bits.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, M]] = []

    def __bool__(self) -> bool:
        """Whether anything was added."""
        return bool(self._waiting)

    def add(self, sums: M) -> None:
        """Add the next sums in order."""
        level, merged = 0, sums
        while self._waiting and self._waiting[-1][0] == level:
            merged = self._waiting.pop()[1].merge(merged)
            level += 1
        self._waiting.append((level, merged))

    def merged(self, empty: str = "there are no rows to evaluate") -> M:
        """Return the sum of everything added; raise OfftowerError(empty) where nothing was."""
        if not self._waiting:
            raise OfftowerError(empty)
        *earlier, (_, merged) = self._waiting
        for _, sums in reversed(earlier):
            merged = sums.merge(merged)
        return merged


def merge_all(sums: Iterable[M], empty: str = "there are no rows to evaluate") -> M:
    """Merge by a `MergeTree`; raise OfftowerError(empty) where there is nothing to merge."""
    tree: MergeTree[M] = MergeTree()
    for one in sums:
        tree.add(one)
    return tree.merged(empty)


def pieces(total: int, wanted: int, workers: int = 1, each: int = 4) -> list[range]:
    """Split 0..total-1 into ranges whose length is a power of two, for `merge_all`.

    Args:
        wanted: largest length of a range.
        workers: ranges are shorter where there would be fewer than `each` for every worker.
    """
    size = 1
    while size * 2 <= wanted and total >= size * 2 * workers * each:
        size *= 2
    return [range(start, min(start + size, total)) for start in range(0, total, size)]
