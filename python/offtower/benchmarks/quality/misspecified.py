"""Learning with a reward model that cannot be right: it sees every other feature only."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from offtower.benchmarks.quality.world import QualityWorld, Value, of_scores
from offtower.data.convert import to_bandit_feedback
from offtower.data.encoding import FeatureEncoding
from offtower.data.simulate.features import vector_matrix
from offtower.models.features import FeatureTensors

Array = NDArray[np.float64]


class HalfBlindRegression(BaseEstimator):  # type: ignore[misc]
    """Logistic regression on all interactions of every other column, as a reward model.

    Columns are those of context and item side by side, an equal number of each.
    """

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty

    def fit(self, pairs: Array, reward: Array) -> HalfBlindRegression:
        self._model = LogisticRegression(C=1.0 / self.penalty, max_iter=500)
        self._model.fit(_interactions(pairs), reward)
        return self

    def predict(self, pairs: Array) -> Array:
        probability: Array = self._model.predict_proba(_interactions(pairs))[:, 1]
        return probability


def half_blind_policy(world: QualityWorld) -> tuple[Value, float]:
    """The greedy policy of such a model: what regression on these features can do."""
    began = time.perf_counter()
    log = to_bandit_feedback(world.log, world.catalogue)
    items = log["action_context"]
    pairs = np.concatenate([log["context"], items[log["action"]]], axis=1)
    model = HalfBlindRegression().fit(pairs, log["reward"])
    seconds = time.perf_counter() - began
    column = world.truth.contexts.column(world.log.schema.context[0].source).combine_chunks()
    contexts = vector_matrix(column, log["context"].shape[1]).astype(np.float64)
    grid = np.concatenate(
        [np.repeat(contexts, len(items), axis=0), np.tile(items, (len(contexts), 1))], axis=1
    )
    scores = torch.from_numpy(model.predict(grid).reshape(len(contexts), len(items)))
    return of_scores(scores * 1e6, world.truth.expected(0, len(contexts))), seconds


def half_blind_settings() -> dict[str, Any]:
    """`reward_model` settings of the same model, cross-fitted."""
    return {
        "kind": "dense",
        "estimator": f"{__name__}:HalfBlindRegression",
        "folds": 3,
    }


class HalfBlindTower(nn.Module):
    """A linear tower over every other number of the one vector that a side has."""

    def __init__(self, encoding: FeatureEncoding, output_dim: int) -> None:
        super().__init__()
        (self._spec,) = encoding.specs
        assert self._spec.dim is not None, "a fitted vector feature has its dimension"
        self.layer = nn.Linear((self._spec.dim + 1) // 2, output_dim)

    def forward(self, features: FeatureTensors) -> Tensor:
        vector = features[self._spec.name]
        assert isinstance(vector, Tensor)
        output: Tensor = self.layer(vector[:, ::2])
        return output


def half_blind_towers() -> dict[str, Any]:
    """`reward_model` settings of the same functions as two towers, cross-fitted."""
    return {
        "kind": "factored",
        "embedding_dim": 8,
        "tower": {"module": f"{__name__}:HalfBlindTower"},
        "folds": 3,
        "epochs": 60,
        "batch_size": 256,
        "learning_rate": 1e-2,
    }


def _interactions(pairs: Array) -> Array:
    half = pairs.shape[1] // 2
    one = np.ones((len(pairs), 1))
    context = np.concatenate([pairs[:, :half][:, ::2], one], axis=1)
    item = np.concatenate([pairs[:, half:][:, ::2], one], axis=1)
    result: Array = (context[:, :, None] * item[:, None, :]).reshape(len(pairs), -1)
    return result
