"""Work cut into parts whose results merge: the same code on one core and on a cluster.

A long pass over a log is written as a pure function of a part (a range of row groups, a range of
batches, a file to write) and as a merge of results. A `Mapper` runs the function on all parts and
hands the results back in the parts' order; `offtower.jobs` has one that runs them on Ray. Results
of floating-point sums are merged in one fixed tree (`merge_all`), so that they have the same bits
however many parts and workers there were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, Self, TypeVar

from offtower.errors import OfftowerError

T = TypeVar("T")
R = TypeVar("R")


class Mapper:
    """Runs a function on parts, one after the other, in this process.

    Attributes:
        workers: parts that run at the same time.
        distributed: whether parts run elsewhere: then two cheap passes in parallel are better than
            one long one, and files are written where every worker sees them.
    """

    workers: int = 1
    distributed: bool = False

    def map(self, function: Callable[[T], R], parts: Sequence[T], task: str = "") -> Iterator[R]:
        """function(part) of each part, in the order of `parts`.

        Args:
            function: may be sent to another process, and may run twice on a part (where a worker
                died): what it writes must be the same files, beside and renamed.
            parts: small; sent with each call.
            task: what is done, for messages.

        Raises:
            OfftowerError, OSError: the function's, of the first part in order that failed.
        """
        for part in parts:
            yield function(part)


class Merging(Protocol):
    """Sums over rows that merge."""

    def merge(self, other: Self) -> Self: ...


M = TypeVar("M", bound=Merging)


class MergeTree(Generic[M]):
    """Merges sums one by one, in a balanced tree of a shape that only their number decides.

    Cutting a sequence into pieces of a power of two, merging each piece and then the results gives
    the same tree, and so the same bits. Nothing is copied more than log2(n) times.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, M]] = []

    def add(self, sums: M) -> None:
        """Add the next sums in order."""
        level, merged = 0, sums
        while self._waiting and self._waiting[-1][0] == level:
            merged = self._waiting.pop()[1].merge(merged)
            level += 1
        self._waiting.append((level, merged))

    def merged(self, empty: str = "there are no rows to evaluate") -> M:
        """The sums of all that was added. Raises OfftowerError(empty) where nothing was."""
        if not self._waiting:
            raise OfftowerError(empty)
        *earlier, (_, merged) = self._waiting
        for _, sums in reversed(earlier):
            merged = sums.merge(merged)
        return merged


def merge_all(sums: Iterable[M], empty: str = "there are no rows to evaluate") -> M:
    """Merge as `MergeTree` does. Raises OfftowerError(empty) where there is nothing to merge."""
    tree: MergeTree[M] = MergeTree()
    for one in sums:
        tree.add(one)
    return tree.merged(empty)


def pieces(total: int, wanted: int, workers: int = 1, each: int = 4) -> list[range]:
    """0..total-1 in ranges of one length, a power of two, for `merge_all`.

    Args:
        wanted: about so many units a range, at most; fewer where that leaves workers without work.
        workers: that share the ranges; there are `each` for every worker where there is enough.
    """
    size = 1
    while size * 2 <= wanted and total >= size * 2 * workers * each:
        size *= 2
    return [range(start, min(start + size, total)) for start in range(0, total, size)]
