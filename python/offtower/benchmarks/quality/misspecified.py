"""Misspecified reward models: they use only every other feature of contexts and items."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from offtower.benchmarks.quality.world import QualityWorld, Value, value_of_scores
from offtower.data.convert import to_bandit_feedback
from offtower.data.encoding import FeatureEncoding
from offtower.data.simulate.features import vector_matrix
from offtower.models.features import FeatureTensors

Array = NDArray[np.float64]


class MisspecifiedRegression(BaseEstimator):  # type: ignore[misc]
    """Logistic regression on interactions of every other context and item feature.

    Input columns are context features followed by as many item features.
    """

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty

    def fit(self, pairs: Array, reward: Array) -> MisspecifiedRegression:
        self._model = LogisticRegression(C=1.0 / self.penalty, max_iter=500)
        self._model.fit(_interactions(pairs), reward)
        return self

    def predict(self, pairs: Array) -> Array:
        probability: Array = self._model.predict_proba(_interactions(pairs))[:, 1]
        return probability


def misspecified_policy(world: QualityWorld) -> tuple[Value, float]:
    """Return the value of the model's greedy policy and the seconds of fitting."""
    began = time.perf_counter()
    log = to_bandit_feedback(world.log, world.catalogue)
    items = log["action_context"]
    pairs = np.concatenate([log["context"], items[log["action"]]], axis=1)
    model = MisspecifiedRegression().fit(pairs, log["reward"])
    seconds = time.perf_counter() - began
    column = world.truth.contexts.column(world.log.schema.context[0].source).combine_chunks()
    contexts = vector_matrix(column, log["context"].shape[1]).astype(np.float64)
    grid = np.concatenate(
        [np.repeat(contexts, len(items), axis=0), np.tile(items, (len(contexts), 1))], axis=1
    )
    scores = torch.from_numpy(model.predict(grid).reshape(len(contexts), len(items)))
    return value_of_scores(scores * 1e6, world.truth.expected(0, len(contexts))), seconds


def misspecified_settings() -> dict[str, Any]:
    """Return the `reward_model` section for `MisspecifiedRegression`, cross-fitted."""
    return {
        "kind": "dense",
        "estimator": f"{__name__}:MisspecifiedRegression",
        "folds": 3,
    }


class MisspecifiedTower(nn.Module):
    """A linear tower over every other component of a single vector feature."""

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


def misspecified_towers() -> dict[str, Any]:
    """Return the `reward_model` section for the same model as two towers, cross-fitted."""
    return {
        "kind": "factored",
        "embedding_dim": 8,
        "tower": {"module": f"{__name__}:MisspecifiedTower"},
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
