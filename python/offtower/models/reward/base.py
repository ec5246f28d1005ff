"""What a reward model q(x, a) offers to training and to evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from offtower.data.rows import EncodedRows
from offtower.ops import DenseReward, FactoredReward


class RewardModel(ABC):
    """A frozen q(x, a), cross-fitted in folds of the log that it was fitted on. What it gives is on
    the device of the data that it was made with."""

    num_folds: int

    @abstractmethod
    def for_training_rows(self, rows: EncodedRows, fold: int) -> DenseReward | FactoredReward:
        """q over the whole catalogue for rows of the training log that all lie in `fold`.

        The rows' own fold took no part in fitting the model that answers (with one fold it did).
        """

    @abstractmethod
    def for_new_rows(self, rows: EncodedRows) -> DenseReward | FactoredReward:
        """q over the whole catalogue for rows of another log: the mean over the folds' models."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write beside a run what its resumption needs (never a pickle)."""
