"""Seeded global order of a log's rows, independent of the number of workers and resumable.

An epoch visits every row once. Row groups are shuffled and gathered into windows that fit in
memory, the rows of a window are permuted and cut into batches. Everything is a function of (seed,
epoch, window), so any number of workers has the same batches; each takes its slice (`rank_slice`).

Permutations sort raw Philox output (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), which numpy guarantees to be stable across versions, unlike `Generator.permutation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offtower.data.columns import splitmix64
from offtower.data.rounds import Rounds
from offtower.errors import ConfigError, DataError

_ROW_GROUPS, _ROWS, _BATCHES = 1, 2, 3
"""Purposes of random streams, part of their keys."""

MAX_FOLDS = 127
"""Fold numbers are int8."""


@dataclass(frozen=True, order=True)
class Cursor:
    """The next batch to read.

    Attributes:
        epoch: number of the epoch, from 0.
        window: number of the window inside the epoch.
        batch: number of the batch inside the window.
    """

    epoch: int = 0
    window: int = 0
    batch: int = 0

    def to_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "window": self.window, "batch": self.batch}

    @classmethod
    def from_dict(cls, content: dict[str, int]) -> Cursor:
        return cls(int(content["epoch"]), int(content["window"]), int(content["batch"]))


@dataclass(frozen=True, slots=True)
class Batch:
    """Positions of a batch's rows in their window, and their common fold.

    edges: first rows in the batch of its rounds, and its number of rows; None without rounds.
    """

    index: NDArray[np.int64]
    fold: int
    edges: NDArray[np.int64] | None = None

    def part(self, rank: int, world_size: int) -> slice:
        """The batch's rows for worker `rank` of `world_size`: `rank_slice` of whole rounds."""
        if self.edges is None:
            return rank_slice(self.index.size, rank, world_size)
        mine = rank_slice(self.edges.size - 1, rank, world_size)
        return slice(int(self.edges[mine.start]), int(self.edges[mine.stop]))


class EpochOrder:
    """The order in which an epoch visits the rows of a log.

    Args:
        row_group_sizes: (g,) rows of each row group, in file order.
        batch_size: largest number of rows of a batch over all workers. Batches of a window and fold
            differ by at most one row, so that there is no small last batch.
        seed: any integer in [0, 2**64).
        shuffle: False keeps the order of the file.
        window_rows: rows permuted together in memory; a larger row group is a window of its own.
        num_folds: with more than one, every batch holds rows of a single fold.

    Raises:
        ConfigError: a number is out of its range.
        DataError: a row group has a negative size.
    """

    def __init__(
        self,
        row_group_sizes: ArrayLike,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        window_rows: int = 1_048_576,
        num_folds: int = 1,
    ) -> None:
        sizes = np.asarray(row_group_sizes, dtype=np.int64)
        if sizes.ndim != 1 or (sizes < 0).any():
            raise DataError("row group sizes must be a list of numbers that are not negative")
        if batch_size < 1 or window_rows < 1:
            raise ConfigError(
                f"batch_size ({batch_size}) and window_rows ({window_rows}) must be at least 1"
            )
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed must lie in [0, 2**64), but is {seed}")
        if not 1 <= num_folds <= MAX_FOLDS:
            raise ConfigError(f"num_folds must lie in [1, {MAX_FOLDS}], but is {num_folds}")
        self.row_group_sizes = sizes
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.window_rows = window_rows
        self.num_folds = num_folds
        self._last_windows: tuple[int, list[tuple[int, ...]]] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return int(self.row_group_sizes.sum())

    def windows(self, epoch: int) -> list[tuple[int, ...]]:
        """Row groups of each window, in file order inside a window.

        Every row group with rows is in exactly one window of at most `window_rows`; the last two
        windows share their row groups evenly.
        """
        if self._last_windows is None or self._last_windows[0] != epoch:
            self._last_windows = (epoch, self._windows(epoch))
        return self._last_windows[1]

    def _windows(self, epoch: int) -> list[tuple[int, ...]]:
        groups = np.flatnonzero(self.row_group_sizes)
        if self.shuffle:
            groups = groups[_permutation(groups.size, self.seed, _ROW_GROUPS, epoch)]
        # ends[k]: rows in the first k row groups of the order
        ends = np.concatenate([[0], np.cumsum(self.row_group_sizes[groups])])
        cuts = [0]
        while cuts[-1] < groups.size:
            limit = ends[cuts[-1]] + self.window_rows
            cut = int(np.searchsorted(ends, limit, side="right")) - 1
            cuts.append(max(cut, cuts[-1] + 1))
        if len(cuts) > 2:
            first, last = cuts[-3], cuts[-1]
            larger = np.maximum(ends[first:last] - ends[first], ends[last] - ends[first:last])
            cuts[-2] = first + 1 + int(np.argmin(larger[1:]))
        return [tuple(np.sort(groups[start:stop]).tolist()) for start, stop in pairwise(cuts)]

    def batches(
        self,
        epoch: int,
        window_number: int,
        n_rows: int,
        fold: NDArray[np.int8] | None = None,
        rounds: Rounds | None = None,
    ) -> list[Batch]:
        """Cut the rows of a window into batches.

        Args:
            epoch: number of the epoch.
            window_number: number of the window in `windows(epoch)`.
            n_rows: good rows of the window.
            fold: (n_rows,) fold of each row, in [0, num_folds); needed with more than one fold.
            rounds: of the rows, which batches then keep whole, in the order of their positions.

        Returns:
            Batches that hold every position in [0, n_rows) exactly once.

        Raises:
            DataError: `fold` is missing, of another length, or outside [0, num_folds).
        """
        if rounds is not None:
            return self._round_batches(epoch, window_number, fold, rounds)
        if self.shuffle:
            rows = _permutation(n_rows, self.seed, _ROWS, epoch, window_number)
        else:
            rows = np.arange(n_rows, dtype=np.int64)
        if self.num_folds == 1:
            batches = [Batch(part, 0) for part in _cut(rows, self.batch_size)]
        else:
            if fold is None or fold.shape != (n_rows,):
                found = "missing" if fold is None else f"of shape {fold.shape}"
                raise DataError(f"fold must have shape ({n_rows},), but is {found}")
            if n_rows and not (fold.min() >= 0 and fold.max() < self.num_folds):
                raise DataError(f"folds must lie in [0, {self.num_folds})")
            fold_in_order = fold[rows]
            batches = [
                Batch(part, number)
                for number in range(self.num_folds)
                for part in _cut(rows[fold_in_order == number], self.batch_size)
            ]
        if self.shuffle:
            # Mix folds, and the larger batches of a fold with the smaller ones.
            turn = _permutation(len(batches), self.seed, _BATCHES, epoch, window_number)
            return [batches[i] for i in turn.tolist()]
        return sorted(batches, key=lambda batch: int(batch.index[0]))

    def _round_batches(
        self, epoch: int, window_number: int, fold: NDArray[np.int8] | None, rounds: Rounds
    ) -> list[Batch]:
        """Batches of whole rounds: as many rounds as rows of `batch_size` hold on average."""
        count = len(rounds)
        mean_length = rounds.num_rows / max(count, 1)
        size = max(1, int(self.batch_size / max(mean_length, 1.0)))
        by_round = replaced(self, batch_size=size)
        folds = None if fold is None else fold[rounds.first]
        made = []
        for batch in by_round.batches(epoch, window_number, count, folds):
            edges = np.concatenate([[0], np.cumsum(rounds.lengths[batch.index])]).astype(np.int64)
            made.append(Batch(rounds.rows_of(batch.index), batch.fold, edges))
        return made


def replaced(order: EpochOrder, *, batch_size: int) -> EpochOrder:
    """The same order with another batch size."""
    return EpochOrder(
        order.row_group_sizes,
        batch_size,
        order.seed,
        order.shuffle,
        order.window_rows,
        order.num_folds,
    )


def rank_slice(n_rows: int, rank: int, world_size: int) -> slice:
    """Return the slice of a batch of `n_rows` for worker `rank` of `world_size`.

    Slices are contiguous, in rank order, and differ by at most one row (as `numpy.array_split`).

    Raises:
        ConfigError: rank is not in [0, world_size).
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must lie in [0, {world_size}), but is {rank}")
    small, larger = divmod(n_rows, world_size)
    start = rank * small + min(rank, larger)
    return slice(start, start + small + (1 if rank < larger else 0))


def fold_of(key: ArrayLike, num_folds: int, seed: int) -> NDArray[np.int8]:
    """Assign rows to folds by a keyed hash of their user or row number.

    Args:
        key: (n,) integers: the user's code or the row's number in the log.
        num_folds: number of folds, in [1, 127].
        seed: key of the hash.

    Returns:
        (n,) int8 in [0, num_folds).
    """
    if not 1 <= num_folds <= MAX_FOLDS:
        raise ConfigError(f"num_folds must lie in [1, {MAX_FOLDS}], but is {num_folds}")
    # Scale the upper 32 bits: negligible bias, no 64-bit overflow.
    upper = keyed_hash(key, seed) >> np.uint64(32)
    return ((upper * np.uint64(num_folds)) >> np.uint64(32)).astype(np.int8)


def keyed_hash(key: ArrayLike, seed: int) -> NDArray[np.uint64]:
    """Hash integers to 64 bits with the finalizer of splitmix64, keyed by `seed`.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    values = np.atleast_1d(np.asarray(key))
    if values.dtype.kind not in "iu":
        raise DataError(f"keys must be integers, but are {values.dtype}")
    secret = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    return splitmix64(values.astype(np.uint64, copy=False) ^ secret)


def _permutation(n: int, seed: int, *purpose: int) -> NDArray[np.int64]:
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=purpose)
    keys = np.random.Philox(sequence).random_raw(n)
    return np.argsort(keys, kind="stable")


def _cut(rows: NDArray[np.int64], batch_size: int) -> Sequence[NDArray[np.int64]]:
    """Cut `rows` into slices of at most `batch_size`, which differ by at most one."""
    parts = -(-rows.size // batch_size)
    small, larger = divmod(rows.size, max(parts, 1))
    starts = np.arange(parts + 1) * small + np.minimum(np.arange(parts + 1), larger)
    edges = starts.tolist()
    return [rows[start:stop] for start, stop in pairwise(edges)]
