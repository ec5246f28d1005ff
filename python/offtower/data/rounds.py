"""Rounds: consecutive rows of a log that were shown together, in the order of their positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offtower.errors import DataError

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rounds:
    """R rounds over n consecutive rows.

    offsets: (R + 1,) int64; round i has the rows offsets[i] to offsets[i + 1] - 1, by position.
    """

    offsets: IntArray

    @classmethod
    def of(cls, round_id: ArrayLike, position: ArrayLike | None = None) -> Rounds:
        """Rounds of rows in order: a change of `round_id` (n,) begins a round.

        Raises:
            DataError: the positions (n,) of a round are not 0, 1, 2, ...
        """
        key = np.asarray(round_id)
        rounds = cls(np.append(np.flatnonzero(key_starts(key)), key.size).astype(np.int64))
        if position is not None:
            wrong = np.asarray(position) != rounds.position
            if wrong.any():
                row = int(np.argmax(wrong))
                raise DataError(
                    f"row {row} has position {np.asarray(position)[row]}, expected "
                    f"{rounds.position[row]}: rows of a round must be consecutive, with positions "
                    "0, 1, 2, ... `offtower ingest` checks this"
                )
        return rounds

    @classmethod
    def of_positions(cls, position: ArrayLike) -> Rounds:
        """Rounds of checked rows: each position 0 begins one."""
        position = np.asarray(position)
        return cls(np.append(np.flatnonzero(position == 0), position.size).astype(np.int64))

    @classmethod
    def of_lengths(cls, lengths: ArrayLike) -> Rounds:
        """Rounds of given lengths (R,)."""
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        return cls(np.concatenate([[0], ends]).astype(np.int64))

    def __len__(self) -> int:
        return self.offsets.size - 1

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    @property
    def first(self) -> IntArray:
        """(R,) first row of each round."""
        return self.offsets[:-1]

    @cached_property
    def lengths(self) -> IntArray:
        """(R,) rows of each round."""
        return np.diff(self.offsets)

    @cached_property
    def number(self) -> IntArray:
        """(n,) round of each row."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def position(self) -> IntArray:
        """(n,) position of each row in its round."""
        return np.arange(self.num_rows) - np.repeat(self.first, self.lengths)

    @property
    def longest(self) -> int:
        """Rows of the longest round; 0 without rounds."""
        return int(self.lengths.max(initial=0))

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sums over the rows of each round: (n, ...) -> (R, ...)."""
        if not len(self):
            return np.zeros((0, *values.shape[1:]), dtype=values.dtype)
        total: NDArray[Any] = np.add.reduceat(values, self.first, axis=0)
        return total

    def rows_of(self, rounds: IntArray) -> IntArray:
        """Rows of the rounds with these numbers, round by round in the order given."""
        lengths = self.lengths[rounds]
        ends = np.cumsum(lengths)
        start = np.repeat(self.first[rounds] - (ends - lengths), lengths)
        return np.asarray(start + np.arange(int(lengths.sum())), dtype=np.int64)


def key_starts(key: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) whether each row begins a run of equal keys."""
    starts = np.ones(key.size, dtype=bool)
    starts[1:] = key[1:] != key[:-1]
    return starts


def cut_before(starts: NDArray[np.bool_], size: int) -> list[int]:
    """Cut n rows into pieces of about `size` rows that begin where `starts` (n,) is true.

    Returns the first row of each piece and n. A round longer than `size` is a piece of its own.
    """
    first = np.flatnonzero(starts)
    edges = [0]
    while starts.size - edges[-1] > size:
        place = int(np.searchsorted(first, edges[-1] + size, side="right")) - 1
        cut = int(first[place]) if place >= 0 else edges[-1]
        if cut <= edges[-1]:  # Longer than size: up to the next start.
            later = int(np.searchsorted(first, edges[-1], side="right"))
            if later >= first.size:
                break
            cut = int(first[later])
        edges.append(cut)
    return [*edges, starts.size]
