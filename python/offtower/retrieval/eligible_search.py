"""Search and draws among the eligible items of each context."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.data.eligible import EligibleRows
from offtower.ops import Eligibility, bit_counts
from offtower.retrieval.cells import Cells
from offtower.retrieval.exact import exact_top_k
from offtower.retrieval.index import AnnIndex
from offtower.retrieval.propensity_sampler import FEW
from offtower.retrieval.row_filter import RowBits

IntArray = NDArray[np.int64]

_CACHE_BYTES = 1 << 28
"""Bits of rows that are kept between calls."""


@dataclass(frozen=True, eq=False)
class ContextSets:
    """The eligible items of n contexts, without those that the caller excludes.

    Args:
        rows: None where every item is eligible.
        exclude: per context, sorted item numbers.
    """

    rows: EligibleRows | None
    exclude: list[IntArray]

    def eligibility(self) -> Eligibility:
        """For the operators; with candidates, as lists alone."""
        count = [len(items) for items in self.exclude]
        row = np.repeat(np.arange(len(count)), count)
        item = np.concatenate([np.zeros(0, dtype=np.int64), *self.exclude])
        every = Eligibility() if self.rows is None else self.rows.on()
        return every.excluding(torch.from_numpy(row), torch.from_numpy(item), len(count)).resolved()


def search_among(
    queries: NDArray[np.float32],
    k: int,
    sets: ContextSets,
    vectors: NDArray[np.generic],
    scale: NDArray[np.float32] | None,
    index: AnnIndex | None,
) -> tuple[NDArray[np.float32], IntArray]:
    """Find the k eligible items of largest logit of each context.

    Candidate lists are scored whole. Otherwise the contexts of a group are searched together: in
    the index, with the group's bitmap as selector, or by scoring the group's items where they are
    few. A context for which the index finds fewer than there are is searched exactly.

    Args:
        vectors, scale: as for `exact_top_k`. index: None scores every eligible item.

    Returns:
        Descending scores (n, k) and item numbers (n, k), padded with -inf and -1.
    """
    eligible = sets.eligibility()
    if index is None or eligible.candidates is not None:
        return exact_top_k(queries, vectors, k, scale, eligible)
    assert eligible.excluded is not None
    skip = int(eligible.excluded.lengths.max()) if len(queries) else 0
    # Search deeper by the number of items that may be excluded.
    deeper = min(len(vectors), k + skip)
    score = np.full((len(queries), k), -np.inf, dtype=np.float32)
    item = np.full((len(queries), k), -1, dtype=np.int64)
    search = _Search(queries, vectors, scale, sets, score, item)
    for rows, words in _groups(eligible, len(queries)):
        if words is not None:
            count = int(bit_counts(torch.from_numpy(words[None]))[0])
            if count * FEW < len(vectors):
                search.score_few(rows, words)
                continue
        if words is None:
            found = index.search(queries[rows], deeper)
        else:
            found = index.search_among(queries[rows], deeper, words)
        search.keep(rows, *found)
    left = np.minimum(eligible.count(len(vectors)).numpy(), k)
    short = np.flatnonzero((item >= 0).sum(axis=1) < left)
    if short.size:
        some = eligible.take(torch.from_numpy(short))
        score[short], item[short] = exact_top_k(queries[short], vectors, k, scale, some)
    return score, item


def _groups(eligible: Eligibility, n: int) -> Iterator[tuple[IntArray, NDArray[np.int64] | None]]:
    """The contexts of each group and the words of its bitmap."""
    if eligible.group is None or eligible.bitmap is None:
        yield np.arange(n), None
        return
    group, bitmap = eligible.group.numpy(), eligible.bitmap.numpy()
    for number in np.unique(group):
        yield np.flatnonzero(group == number), np.ascontiguousarray(bitmap[number])


@dataclass(frozen=True, eq=False)
class _Search:
    """A search among eligible items, and its results so far.

    queries, vectors, scale: as for `exact_top_k`. score, item: (n, k) results, best first.
    """

    queries: NDArray[np.float32]
    vectors: NDArray[np.generic]
    scale: NDArray[np.float32] | None
    sets: ContextSets
    score: NDArray[np.float32]
    item: IntArray

    def score_few(self, rows: IntArray, words: NDArray[np.int64]) -> None:
        """Score all items of a group of contexts."""
        count = len(self.vectors)
        own = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little", count=count))
        if not len(own):
            return
        sets = self.sets
        skip = max(len(sets.exclude[row]) for row in rows)
        if sets.rows is not None and sets.rows.excluded is not None:
            skip += int(np.diff(sets.rows.excluded.offsets)[rows].max())
        deeper = min(len(own), self.score.shape[1] + skip)
        score, index = exact_top_k(self.queries[rows], self.vectors[own], deeper, self.scale)
        self.keep(rows, score, own[index])

    def keep(self, rows: IntArray, score: NDArray[np.float32], item: IntArray) -> None:
        """Write the best items of some contexts that are not excluded."""
        sets, k = self.sets, self.score.shape[1]
        seen = None if sets.rows is None else sets.rows.excluded
        for i, row in enumerate(rows):
            keep = (item[i] >= 0) & ~np.isin(item[i], sets.exclude[row])
            if seen is not None:
                keep &= ~np.isin(item[i], seen.values[seen.offsets[row] : seen.offsets[row + 1]])
            found = np.flatnonzero(keep)[:k]
            self.score[row, : len(found)] = score[i, found]
            self.item[row, : len(found)] = item[i, found]


class RowSets:
    """What `PropensitySampler` draws among, for each context; bits of groups are kept."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._bits: OrderedDict[int, RowBits] = OrderedDict()

    def of(self, sets: ContextSets) -> list[tuple[IntArray, RowBits | IntArray | None]]:
        """Per context, the items to exclude, and those to draw among."""
        rows = sets.rows
        if rows is None:
            return [(skip, None) for skip in sets.exclude]
        eligible = rows.on()
        found: list[tuple[IntArray, RowBits | IntArray | None]] = []
        for row, skip in enumerate(sets.exclude):
            if eligible.candidates is not None:
                first, last = eligible.candidates.offsets[row : row + 2].tolist()
                found.append((skip, eligible.candidates.items[first:last].numpy()))
                continue
            if rows.excluded is not None:
                first, last = rows.excluded.offsets[row : row + 2]
                skip = np.union1d(skip, rows.excluded.values[first:last])
            bits = None
            if rows.group is not None and eligible.bitmap is not None:
                assert eligible.group is not None
                bits = self._of_group(int(rows.group[row]), eligible.bitmap[eligible.group[row]])
            found.append((skip, bits))
        return found

    def _of_group(self, key: int, words: torch.Tensor) -> RowBits:
        if key in self._bits:
            self._bits.move_to_end(key)
            return self._bits[key]
        found = RowBits.of(self._cells, words.numpy())
        self._bits[key] = found
        size = found.bits.nbytes + found.count.nbytes
        while len(self._bits) > 1 and size * len(self._bits) > _CACHE_BYTES:
            self._bits.popitem(last=False)
        return found
