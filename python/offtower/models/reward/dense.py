"""Dense reward model: any scikit-learn regressor or classifier over pairs (context, item).

For small catalogues: predictions for all rows of the log and all items are kept, as float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offtower.config import RewardModelConfig
from offtower.data.encoding import BagArray, FeatureArrays, FeatureEncoding
from offtower.data.features import CPU, tensor_of
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError, RunError
from offtower.imports import load_class
from offtower.models.reward.base import RewardModel
from offtower.ops import DenseReward

MAX_CELLS = 500_000_000
"""Limit of rows x items of stored predictions: 2 GB as float32."""

_MAX_ONE_HOT = 512
_PAIRS_AT_ONCE = 1_000_000


class DenseRewardModel(RewardModel):
    """K regressors; predictions for the training rows are computed once and indexed by row number.

    Args:
        estimators: fitted, one per fold; `predict` or `predict_proba` on (pairs, features).
        design: turns encoded rows and items into the regressors' matrices.
        values: (n, N) float32 out-of-fold predictions for the training log, by row number.
        device: of the predictions.
    """

    def __init__(
        self,
        estimators: list[Any],
        design: PairDesign,
        values: np.ndarray,
        device: torch.device = CPU,
    ) -> None:
        self._estimators = estimators
        self._design = design
        self._values = values
        self._device = device
        self.num_folds = max(1, len(estimators))

    def for_training_rows(self, rows: EncodedRows, fold: int) -> DenseReward:
        return DenseReward(tensor_of(self._values[rows.row], self._device))

    def for_new_rows(self, rows: EncodedRows) -> DenseReward:
        if not self._estimators:
            raise RunError(
                "this dense reward model was restored for training only; fit it again to predict"
            )
        total = sum(self._design.predict(e, rows.context) for e in self._estimators)
        mean = np.asarray(total / len(self._estimators), dtype=np.float32)
        return DenseReward(tensor_of(mean, self._device))

    def save(self, directory: Path) -> None:
        np.save(directory / "values.npy", self._values, allow_pickle=False)

    @classmethod
    def restore(
        cls, directory: Path, design: PairDesign, folds: int, device: torch.device = CPU
    ) -> DenseRewardModel:
        """Load the predictions, without the regressors, which only a pickle could store."""
        try:
            values = np.load(directory / "values.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise RunError(f"reward model at '{directory}' cannot be read: {error}") from error
        model = cls([], design, values, device)
        model.num_folds = folds
        return model


class PairDesign:
    """Design matrix of a regression on (context, item), with categories one-hot."""

    def __init__(
        self,
        context_encoding: FeatureEncoding,
        item_encoding: FeatureEncoding,
        item_arrays: FeatureArrays,
        num_items: int,
    ) -> None:
        self._context_encoding = context_encoding
        self.num_items = num_items
        self._items = flatten(item_encoding, item_arrays, num_items, "catalogue")

    def logged(self, rows: EncodedRows) -> np.ndarray:
        """(n, features) of the logged pairs."""
        return np.concatenate([self._contexts(rows.context), self._items[rows.action]], axis=1)

    def predict(self, estimator: Any, context: FeatureArrays) -> np.ndarray:
        """(n, N) predictions of one regressor."""
        contexts = self._contexts(context)
        n = len(contexts)
        result = np.empty((n, self.num_items), dtype=np.float32)
        for start, stop in _slices(n, max(1, _PAIRS_AT_ONCE // self.num_items)):
            block = contexts[start:stop]
            pairs = np.concatenate(
                [
                    np.repeat(block, self.num_items, axis=0),
                    np.tile(self._items, (len(block), 1)),
                ],
                axis=1,
            )
            result[start:stop] = predict(estimator, pairs).reshape(len(block), self.num_items)
        return result

    def _contexts(self, context: FeatureArrays) -> np.ndarray:
        return flatten(self._context_encoding, context, _length(context), "log")


def make_estimator(config: RewardModelConfig, seed: int) -> Any:
    """Build the configured scikit-learn estimator, with a seeded `random_state` if it has one."""
    kind = _estimator_class(config.estimator)
    try:
        estimator = kind(**config.arguments)
    except TypeError as error:
        raise ConfigError(
            f"reward_model.arguments do not fit '{config.estimator}': {error}"
        ) from None
    parameters = estimator.get_params()
    if parameters.get("random_state", 0) is None:
        estimator.set_params(random_state=seed % (2**32))
    return estimator


def fit_estimator(
    config: RewardModelConfig,
    seed: int,
    pairs: np.ndarray,
    reward: np.ndarray,
    row_weight: np.ndarray | None = None,
) -> Any:
    """Build the configured estimator and fit it.

    Args:
        row_weight: (n,) weights of the rows of a down-sampled log, as `sample_weight`.

    Raises:
        ConfigError: it refuses its settings or the data, or takes no weights.
    """
    estimator = make_estimator(config, seed)
    more = {} if row_weight is None else {"sample_weight": row_weight / row_weight.mean()}
    try:
        return estimator.fit(pairs, reward, **more)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"reward_model.estimator '{config.estimator}' cannot be fitted with these "
            f"reward_model.arguments: {error}"
        ) from error


def _estimator_class(path: str) -> type[Any]:
    """A regressor or classifier class: others of scikit-learn may read pickles (`memory`)."""
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

    if not path.startswith("sklearn."):
        return load_class(path, "reward_model.estimator", object, "object")
    kind = load_class(path, "reward_model.estimator", BaseEstimator, "sklearn.base.BaseEstimator")
    if not issubclass(kind, (RegressorMixin, ClassifierMixin)):
        raise ConfigError(f"reward_model.estimator: '{path}' is no regressor and no classifier")
    return kind


def predict(estimator: Any, pairs: np.ndarray) -> np.ndarray:
    """Expected reward of pairs, from a classifier's probabilities or a regressor's prediction."""
    if hasattr(estimator, "predict_proba"):
        classes = list(estimator.classes_)
        probability = estimator.predict_proba(pairs)
        return np.asarray(probability @ np.asarray(classes, dtype=np.float64))
    return np.asarray(estimator.predict(pairs))


def flatten(encoding: FeatureEncoding, arrays: FeatureArrays, n: int, where: str) -> np.ndarray:
    """Encoded features -> (n, width) float64: numbers, one-hot categories, bags as counts."""
    parts: list[np.ndarray] = []
    for spec in encoding.specs:
        value = arrays[spec.name]
        if spec.kind in ("numeric", "vector"):
            assert isinstance(value, np.ndarray)
            parts.append(np.asarray(value, dtype=np.float64).reshape(n, -1))
            continue
        width = encoding.cardinality(spec.name)
        if width > _MAX_ONE_HOT:
            raise ConfigError(
                f"feature '{spec.name}' of the {where} has {width} values, too many for a dense "
                f"reward model (at most {_MAX_ONE_HOT}). Use reward_model.kind=factored"
            )
        matrix = np.zeros((n, width))
        if isinstance(value, BagArray):
            row = np.repeat(np.arange(n), np.diff(value.offsets))
            np.add.at(matrix, (row, value.values), 1.0)
        else:
            matrix[np.arange(n), value] = 1.0
        parts.append(matrix)
    if not parts:
        return np.zeros((n, 0))
    return np.concatenate(parts, axis=1)


def check_size(rows: int, items: int) -> None:
    if rows * items > MAX_CELLS:
        raise ConfigError(
            f"a dense reward model would hold {rows:,} rows x {items:,} items = "
            f"{rows * items:,} predictions (at most {MAX_CELLS:,}). "
            "Use reward_model.kind=factored"
        )


def _slices(total: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, step):
        yield start, min(start + step, total)


def _length(arrays: FeatureArrays) -> int:
    first = next(iter(arrays.values()))
    return len(first.offsets) - 1 if isinstance(first, BagArray) else len(first)
