"""The mean of one of several per-row terms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offtower.evaluation.rows import Array


@dataclass(frozen=True)
class TermMean:
    """The mean of one of k terms."""

    index: int
    count: int
    name: str = "mean"

    def combine(self, mean: Array) -> Array:
        return np.asarray(mean[..., self.index])

    def gradient(self, mean: Array) -> Array:
        return np.asarray(np.eye(self.count)[self.index])
