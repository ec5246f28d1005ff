"""Reward models as an evaluation reads them, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from offtower.data.rows import EncodedRows
from offtower.evaluation.rows import Array
from offtower.evaluation.scoring.pair_models import PairRewardModel
from offtower.models.item_draws import rewards_at
from offtower.models.reward.base import RewardModel
from offtower.ops.types import RewardTerms


@dataclass(frozen=True)
class CatalogueReward:
    """q of a batch's n rows over the whole catalogue.

    at_draws: average q over items drawn from a policy instead of summing over the catalogue.
    """

    terms: RewardTerms
    at_draws: bool = False

    def at(self, item: Tensor) -> Array:
        """q at items (n, S)."""
        return np.asarray(rewards_at(self.terms, item).double().cpu().numpy())

    def mean_at(self, item: Tensor) -> Array:
        """(n,) means of q over items (n, S)."""
        return np.asarray(rewards_at(self.terms, item).double().mean(dim=1).cpu().numpy())


@dataclass(frozen=True)
class PairReward:
    """A model over (context, item) pairs on a batch's n rows; only read at given items."""

    model: PairRewardModel
    encoded: EncodedRows

    def at(self, item: Tensor) -> Array:
        """q at items (n, S)."""
        return self.model.at(self.encoded, item.cpu().numpy())

    def mean_at(self, item: Tensor) -> Array:
        """(n,) means of q over items (n, S)."""
        return np.asarray(self.at(item).mean(axis=1))


BatchReward = CatalogueReward | PairReward


@dataclass(frozen=True)
class EvaluationModel:
    """A reward model of an evaluation.

    Attributes:
        name: linear, trees, two_tower or dense.
        owner: position of the run whose encoding it reads.
        model: q over the whole catalogue, or of pairs.
    """

    name: str
    owner: int
    model: RewardModel | PairRewardModel

    @property
    def of_pairs(self) -> bool:
        """Whether it predicts pairs, and not the whole catalogue at once."""
        return isinstance(self.model, PairRewardModel)

    def examination(self, rows: EncodedRows) -> Array | None:
        """(n,) factors of the rows' positions in their slates; None for 1."""
        if isinstance(self.model, PairRewardModel) or rows.rounds is None:
            return None
        found = self.model.examination(rows)
        return None if found is None else found.double().cpu().numpy()

    def on(self, rows: EncodedRows) -> BatchReward:
        """The model on a batch, to be read at given items."""
        if isinstance(self.model, PairRewardModel):
            return PairReward(self.model, rows)
        return CatalogueReward(self.model.for_new_rows(rows), at_draws=True)

    def over_catalogue(self, rows: EncodedRows) -> CatalogueReward:
        """The model on a batch, to be summed over all items; for pairs only a few rows x items."""
        if isinstance(self.model, PairRewardModel):
            return CatalogueReward(self.model.over_catalogue(rows))
        return CatalogueReward(self.model.for_new_rows(rows))


@dataclass(frozen=True)
class RewardModels:
    """The reward models of an evaluation, and how their expectation under a policy is taken.

    Attributes:
        models: fitted. main: name of the one that the estimators read; None without one.
        at_draws: average over items drawn from the policy instead of summing over the catalogue.
        pairs_at_draws: the same for models over pairs.
        draws: items drawn for each row.
    """

    models: tuple[EvaluationModel, ...]
    main: str | None
    at_draws: bool
    pairs_at_draws: bool
    draws: int

    def on(self, encoded: Sequence[EncodedRows]) -> dict[str, BatchReward]:
        """By name, the models on a batch, which is given in the encoding of each run.

        Those that are summed come first, then those over the catalogue, then those over pairs.
        """
        found: list[tuple[int, str, BatchReward]] = []
        for model in self.models:
            rows = encoded[model.owner]
            if self.pairs_at_draws if model.of_pairs else self.at_draws:
                found.append((2 if model.of_pairs else 1, model.name, model.on(rows)))
            else:
                found.append((0, model.name, model.over_catalogue(rows)))
        return {name: reward for _, name, reward in sorted(found, key=lambda one: one[0])}

    @property
    def main_model(self) -> EvaluationModel | None:
        """The model that the estimators read."""
        return next((one for one in self.models if one.name == self.main), None)

    def examinations(self, encoded: Sequence[EncodedRows]) -> dict[str, Array | None]:
        """By name, the factors of a batch's positions, in the encoding of each run."""
        return {model.name: model.examination(encoded[model.owner]) for model in self.models}
