"""Reward models over (context, item) pairs: any scikit-learn estimator, any catalogue.

They learn from the run's training log and are read on another one, so no folds are needed. They do
not factor: over a large catalogue their expected reward is a mean over drawn items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.config import RewardModelConfig
from offtower.data.encoding import FeatureArrays, FeatureEncoding, take
from offtower.data.order import EpochOrder
from offtower.data.rows import EncodedRows
from offtower.errors import RunError
from offtower.models.reward.dense import fit_estimator, flatten, predict
from offtower.ops import DenseReward
from offtower.prepare import PreparedData
from offtower.seeds import derive_seed

EXACT_PAIRS = 20_000_000
"""Rows x items up to which a model over pairs is summed over the whole catalogue."""
_PAIRS_AT_ONCE = 500_000
_FIT_BATCH = 8192

_LINEAR = {True: "sklearn.linear_model:LogisticRegression", False: "sklearn.linear_model:Ridge"}
_TREES = {
    True: "sklearn.ensemble:HistGradientBoostingClassifier",
    False: "sklearn.ensemble:HistGradientBoostingRegressor",
}


class PairRewardModel:
    """q(x, a) of pairs.

    Args:
        estimator: fitted, `predict` or `predict_proba` on (pairs, features).
        context_encoding, item_encoding: fitted.
        items: encoded features of the whole catalogue.
        num_items: N.
    """

    def __init__(
        self,
        estimator: Any,
        context_encoding: FeatureEncoding,
        item_encoding: FeatureEncoding,
        items: FeatureArrays,
        num_items: int,
    ) -> None:
        self._estimator = estimator
        self._context_encoding = context_encoding
        self._item_encoding = item_encoding
        self._items = items
        self.num_items = num_items

    def at(self, rows: EncodedRows, item: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n, S) q of each row's context and its S items."""
        n, draws = item.shape
        row = np.repeat(np.arange(n), draws)
        flat = item.reshape(-1)
        out = np.empty(flat.size)
        for start in range(0, flat.size, _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            matrix = _pair_features(
                (self._context_encoding, rows.context, row[part]),
                (self._item_encoding, self._items, flat[part]),
            )
            out[part] = predict(self._estimator, matrix)
        return out.reshape(n, draws)

    def over_catalogue(self, rows: EncodedRows) -> DenseReward:
        """q of all items; for rows x items up to EXACT_PAIRS."""
        every = np.arange(self.num_items, dtype=np.int64)
        values = np.empty((len(rows), self.num_items), dtype=np.float32)
        step = max(1, _PAIRS_AT_ONCE // self.num_items)
        for start in range(0, len(rows), step):
            part = rows.take(np.arange(start, min(start + step, len(rows))))
            values[start : start + step] = self.at(part, np.tile(every, (len(part), 1)))
        return DenseReward(torch.from_numpy(values))


_Side = tuple[FeatureEncoding, FeatureArrays, NDArray[np.int64]]
"""Encoding, features and the row of each pair, of contexts or of items."""


def _pair_features(context: _Side, item: _Side) -> NDArray[np.float64]:
    """(m, features) of contexts and items side by side; flattens only rows that the pairs need."""
    sides = []
    for (encoding, features, index), source in ((context, "log"), (item, "catalogue")):
        needed, place = np.unique(index, return_inverse=True)
        sides.append(flatten(encoding, take(features, needed), needed.size, source)[place])
    return np.concatenate(sides, axis=1)


def fit_pair_estimator(
    config: RewardModelConfig, data: PreparedData, seed: int, max_rows: int
) -> Any:
    """Fit a scikit-learn estimator on the training log, or on random row groups of it above
    `max_rows` rows.

    config: of kind "dense"; its folds are ignored.
    Raises RunError where all rewards are equal.
    """
    items = data.item_encoding.encode(data.catalogue.table(0, data.catalogue.num_items))
    order = EpochOrder(
        data.train.row_group_sizes, _FIT_BATCH, seed=derive_seed(seed, "pair model rows")
    )
    matrices, rewards, weights, count = [], [], [], 0
    with data.batches(order) as reader:
        for _, rows, _ in reader.epoch(0):
            every = np.arange(len(rows), dtype=np.int64)
            matrices.append(
                _pair_features(
                    (data.context_encoding, rows.context, every),
                    (data.item_encoding, items, rows.action),
                )
            )
            rewards.append(rows.reward.astype(np.float64))
            if rows.row_weight is not None:
                weights.append(rows.row_weight)
            count += len(rows)
            if count >= max_rows:
                break
    reward = np.concatenate(rewards)
    if np.unique(reward).size < 2:
        raise RunError("all rewards of the training log are equal: no reward model can be fitted")
    model_seed = derive_seed(seed, "pair model")
    weight = np.concatenate(weights) if weights else None
    return fit_estimator(config, model_seed, np.concatenate(matrices), reward, weight)


def pair_model(estimator: Any, data: PreparedData) -> PairRewardModel:
    """Return the model of an estimator that `fit_pair_estimator` fitted on the same data."""
    items = data.item_encoding.encode(data.catalogue.table(0, data.catalogue.num_items))
    encodings = (data.context_encoding, data.item_encoding)
    return PairRewardModel(estimator, *encodings, items, data.catalogue.num_items)


def linear_config(binary: bool) -> RewardModelConfig:
    """Logistic regression for rewards in {0, 1}, else ridge."""
    arguments = {"max_iter": 300} if binary else {}
    return RewardModelConfig(kind="dense", estimator=_LINEAR[binary], arguments=arguments)


def trees_config(binary: bool) -> RewardModelConfig:
    """Gradient-boosted trees."""
    return RewardModelConfig(kind="dense", estimator=_TREES[binary])
