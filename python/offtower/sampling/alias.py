"""Constant-time draws from a fixed discrete distribution (alias method)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class AliasTable:
    """Walker's alias table: cell i holds value i with probability kept_i, else value alias_i.

    Built without a loop. With w = n p, light values (w <= 1) leave 1 - w of their cell free, and
    heavy values have an excess of w - 1. Free parts and excesses are laid end to end. A light
    value's alias is the heavy value whose excess covers the start of its free part. A heavy value
    whose excess is overdrawn takes the next heavy value as its alias.

    Args:
        weights: (n,) finite, non-negative, not all zero.

    Source: Walker 1977; Vose 1991, "A linear algorithm for generating random numbers with a given
    distribution"; the sweep as in Huebschle-Schneider and Sanders 2022, "Parallel weighted random
    sampling".
    """

    def __init__(self, weights: NDArray[np.floating]) -> None:
        wide = np.asarray(weights, dtype=np.float64)
        n = wide.size
        scaled = wide * (n / wide.sum())
        light = np.flatnonzero(scaled <= 1.0)
        heavy = np.flatnonzero(scaled > 1.0)
        kept = np.minimum(scaled, 1.0)
        alias = np.arange(n, dtype=np.int64)
        if heavy.size:
            taken = np.cumsum(1.0 - scaled[light])
            given = np.cumsum(scaled[heavy] - 1.0)
            before = np.concatenate([[0.0], taken[:-1]]) if light.size else taken
            donor = np.searchsorted(given, before, side="right")
            alias[light] = heavy[np.minimum(donor, heavy.size - 1)]
            # The first light value beyond a heavy value's excess overdraws it.
            last = np.searchsorted(taken, given, side="left")
            short = last < light.size
            short[-1] = False  # The last one covers the rest, up to rounding.
            overdrawn = taken[np.minimum(last, light.size - 1)] - given if light.size else given
            kept[heavy] = np.where(short, np.clip(1.0 - overdrawn, 0.0, 1.0), 1.0)
            following = np.append(heavy[1:], heavy[-1])
            alias[heavy] = np.where(short, following, heavy)
        self._kept = kept
        self._alias = alias if n >= 2**31 else alias.astype(np.int32)

    @property
    def size(self) -> int:
        return len(self._kept)

    def probabilities(self) -> NDArray[np.float64]:
        """(n,) probabilities that the table represents."""
        result: NDArray[np.float64] = self._kept.copy()
        np.add.at(result, self._alias, 1.0 - self._kept)
        result /= self.size
        return result

    def draw(self, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """Draw m values from (m, 2) independent uniform numbers in [0, 1)."""
        cell = np.minimum((uniform[:, 0] * self.size).astype(np.int64), self.size - 1)
        borrowed = uniform[:, 1] >= self._kept[cell]
        return np.where(borrowed, self._alias[cell], cell)
