"""Reward models over pairs (context, item) for judging: any scikit-learn estimator, any catalogue.

They learn from the run's training log, which is not the log that is judged, so no folds are needed.
They do not factor: over a large catalogue their expected reward is a mean over drawn items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offtower.config import RewardModelConfig
from offtower.data.encoding import FeatureArrays, FeatureEncoding, take
from offtower.data.order import EpochOrder
from offtower.data.reader import BatchReader
from offtower.data.rows import EncodedRows
from offtower.errors import RunError
from offtower.models.reward.dense import flatten, make_estimator, predict
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

    def pairs(
        self, context: FeatureArrays, row: NDArray[np.int64], item: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """(m, features) of the pairs (context row[j], item[j])."""
        return pair_matrix(
            self._context_encoding, context, row, self._item_encoding, self._items, item
        )

    def logged(self, rows: EncodedRows) -> NDArray[np.float64]:
        """(n,) q of the logged pairs."""
        return self.at(rows, rows.action[:, None])[:, 0]

    def at(self, rows: EncodedRows, item: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n, S) q of each row's context and its S items."""
        n, draws = item.shape
        row = np.repeat(np.arange(n), draws)
        flat = item.reshape(-1)
        out = np.empty(flat.size)
        for start in range(0, flat.size, _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            matrix = self.pairs(rows.context, row[part], flat[part])
            out[part] = predict(self._estimator, matrix)
        return out.reshape(n, draws)

    def everywhere(self, rows: EncodedRows) -> DenseReward:
        """q of all items; for rows x items up to EXACT_PAIRS."""
        every = np.arange(self.num_items, dtype=np.int64)
        values = np.empty((len(rows), self.num_items), dtype=np.float32)
        step = max(1, _PAIRS_AT_ONCE // self.num_items)
        for start in range(0, len(rows), step):
            part = rows.take(np.arange(start, min(start + step, len(rows))))
            values[start : start + step] = self.at(part, np.tile(every, (len(part), 1)))
        return DenseReward(torch.from_numpy(values))


def pair_matrix(
    context_encoding: FeatureEncoding,
    context: FeatureArrays,
    row: NDArray[np.int64],
    item_encoding: FeatureEncoding,
    items: FeatureArrays,
    item: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Features of contexts and of items side by side; only what the pairs need is flattened."""
    some_rows, at_row = np.unique(row, return_inverse=True)
    some_items, at_item = np.unique(item, return_inverse=True)
    left = flatten(context_encoding, take(context, some_rows), some_rows.size, "log")
    right = flatten(item_encoding, take(items, some_items), some_items.size, "catalogue")
    return np.concatenate([left[at_row], right[at_item]], axis=1)


def fit_pair_model(
    config: RewardModelConfig, data: PreparedData, seed: int, max_rows: int
) -> PairRewardModel:
    """Fit on the training log: on random row groups of it where it has more than `max_rows` rows.

    config: of kind "dense"; its estimator and arguments count, its folds do not.
    """
    items = data.item_encoding.encode(data.catalogue.table(0, data.catalogue.num_items))
    order = EpochOrder(
        data.train.row_group_sizes, _FIT_BATCH, seed=derive_seed(seed, "pair model rows")
    )
    matrices, rewards, count = [], [], 0
    reader = BatchReader(
        data.train,
        data.catalogue,
        data.context_encoding,
        order,
        on_bad_rows=data.on_bad_rows,
        quarantine=data.quarantine_of("train"),
    )
    with reader:
        for _, rows, _ in reader.epoch(0):
            every = np.arange(len(rows), dtype=np.int64)
            matrices.append(
                pair_matrix(
                    data.context_encoding,
                    rows.context,
                    every,
                    data.item_encoding,
                    items,
                    rows.action,
                )
            )
            rewards.append(rows.reward.astype(np.float64))
            count += len(rows)
            if count >= max_rows:
                break
    reward = np.concatenate(rewards)
    if np.unique(reward).size < 2:
        raise RunError("all rewards of the training log are equal: no reward model can be fitted")
    estimator = make_estimator(config, derive_seed(seed, "pair model"))
    estimator.fit(np.concatenate(matrices), reward)
    return PairRewardModel(
        estimator, data.context_encoding, data.item_encoding, items, data.catalogue.num_items
    )


def linear_config(binary: bool) -> RewardModelConfig:
    """Logistic regression for rewards in {0, 1}, else ridge, on the features side by side."""
    arguments = {"max_iter": 300} if binary else {}
    return RewardModelConfig(kind="dense", estimator=_LINEAR[binary], arguments=arguments)


def trees_config(binary: bool) -> RewardModelConfig:
    """Gradient-boosted trees."""
    return RewardModelConfig(kind="dense", estimator=_TREES[binary])
