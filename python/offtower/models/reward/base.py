"""Interface of reward models q(x, a)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor

from offtower.data.rows import EncodedRows
from offtower.ops import DenseReward, FactoredReward


class RewardModel(ABC):
    """A frozen q(x, a), cross-fitted on the training log; predictions are on the data's device."""

    num_folds: int

    @abstractmethod
    def for_training_rows(self, rows: EncodedRows, fold: int) -> DenseReward | FactoredReward:
        """q over the whole catalogue for rows of the training log, all of them in `fold`.

        The model that predicts was fitted without that fold (unless there is only one).
        """

    @abstractmethod
    def for_new_rows(self, rows: EncodedRows) -> DenseReward | FactoredReward:
        """q over the whole catalogue for rows of another log: the mean over the folds' models."""

    def examination(self, rows: EncodedRows) -> Tensor | None:
        """(n,) factors of the rows' positions on q, which is of the reference position 0.

        None where the model does not tell positions apart.
        """
        return None

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write what resuming a run needs, without pickles."""
