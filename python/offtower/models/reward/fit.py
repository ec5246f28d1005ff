"""Fit the reward model of a run, cross-fitted in folds of the training log, or restore it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from torch import Tensor, nn

from offtower.checksums import checked_directory, is_complete, verify_directory
from offtower.config import RewardModelConfig
from offtower.data.encoding import FeatureEncoding, take, tensor_of, to_tensors
from offtower.data.order import EpochOrder, fold_of
from offtower.data.reader import BatchReader, scan
from offtower.data.rows import EncodedRows
from offtower.errors import RunError
from offtower.models.items import DEFAULT_CHUNK, ItemFeatures
from offtower.models.optimizer import make_optimizer
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.reward.dense import (
    DenseRewardModel,
    PairDesign,
    check_size,
    make_estimator,
)
from offtower.models.reward.factored import FactoredRewardModel, Link, make_towers
from offtower.objectives import LoggedRows, Reduction, Regression
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed, seed_torch

SCAN_ROWS = 8192
_REMEDY = "restore the folder from a copy, or remove it: the reward model is then fitted again"

M = TypeVar("M", bound=nn.Module)


def reward_folds(rows: EncodedRows, folds: int, seed: int) -> np.ndarray:
    """(n,) fold of each row: by user where the log knows users, else by row number."""
    key = rows.row if rows.user_id is None else rows.user_id
    return fold_of(key, folds, derive_seed(seed, "folds"))


def obtain_reward_model(
    config: RewardModelConfig,
    data: PreparedData,
    seed: int,
    progress: Progress,
    directory: Path | None = None,
    *,
    for_new_rows: bool = False,
) -> RewardModel | None:
    """Restore the reward model from `directory`, or fit it and store it there.

    None where the configuration names no reward model. With equal data, configuration and seed
    the fit repeats to the bit, so a run killed before the model was stored fits it anew.
    """
    if config.kind == "none":
        return None
    stored = directory is not None and is_complete(directory)
    if stored and config.kind == "dense" and for_new_rows:
        # Regressors cannot be stored without a pickle: they are fitted again, to the same bits.
        return fit_reward_model(config, data, seed, progress)
    if directory is not None and stored:
        if config.kind == "dense":
            verify_directory(directory, _REMEDY)
            return DenseRewardModel.restore(directory, _design(data), config.folds, data.device)
        return restore_reward_model(
            config, directory, data.context_encoding, data.item_encoding, data.items
        )
    model = fit_reward_model(config, data, seed, progress)
    if directory is not None:
        with checked_directory(directory) as temporary:
            model.save(temporary)
    return model


def fit_reward_model(
    config: RewardModelConfig, data: PreparedData, seed: int, progress: Progress
) -> RewardModel:
    """Fit q(x, a) on the training log."""
    if config.kind == "dense":
        return _fit_dense(config, data, seed, progress)
    return _fit_factored(config, data, seed, progress)


def restore_reward_model(
    config: RewardModelConfig,
    directory: Path,
    context_encoding: FeatureEncoding,
    item_encoding: FeatureEncoding,
    items: ItemFeatures,
) -> FactoredRewardModel:
    """A factored reward model that a run stored, over the catalogue `items`."""
    verify_directory(directory, _REMEDY)
    return FactoredRewardModel.restore(
        directory, config, context_encoding, item_encoding, items, DEFAULT_CHUNK
    )


def _design(data: PreparedData) -> PairDesign:
    catalogue = data.catalogue
    arrays = data.item_encoding.encode(catalogue.table(0, catalogue.num_items))
    return PairDesign(data.context_encoding, data.item_encoding, arrays, catalogue.num_items)


def _fit_dense(
    config: RewardModelConfig, data: PreparedData, seed: int, progress: Progress
) -> DenseRewardModel:
    check_size(data.train.num_rows, data.catalogue.num_items)
    design = _design(data)
    parts = list(
        scan(
            data.train,
            data.catalogue,
            data.context_encoding,
            SCAN_ROWS,
            on_bad_rows=data.on_bad_rows,
            quarantine=data.quarantine_of("train"),
        )
    )
    pairs = np.concatenate([design.logged(part) for part in parts])
    reward = np.concatenate([part.reward for part in parts]).astype(np.float64)
    fold = np.concatenate([reward_folds(part, config.folds, seed) for part in parts])
    progress.start("fitting the reward model", config.folds)
    estimators = []
    for k in range(config.folds):
        chosen = np.ones(len(fold), dtype=bool) if config.folds == 1 else fold != k
        if not chosen.any() or not (fold == k).any():
            raise RunError(
                f"the log's {len(fold)} rows (or users) do not fill {config.folds} folds; "
                "lower reward_model.folds"
            )
        estimator = make_estimator(config, derive_seed(seed, "reward model", k))
        estimators.append(estimator.fit(pairs[chosen], reward[chosen]))
        progress.advance(1)
    progress.finish()
    rows = int(max(part.row.max() for part in parts)) + 1
    values = np.empty((rows, data.catalogue.num_items), dtype=np.float32)
    progress.start("predicting rewards", len(fold))
    for part, folds in _with_folds(parts, fold):
        for k in np.unique(folds):
            index = np.flatnonzero(folds == k)
            values[part.row[index]] = design.predict(estimators[k], take(part.context, index))
        progress.advance(len(folds))
    progress.finish()
    return DenseRewardModel(estimators, design, values, data.device)


def _with_folds(parts: list[EncodedRows], fold: np.ndarray) -> list[tuple[EncodedRows, np.ndarray]]:
    ends = np.cumsum([len(part.reward) for part in parts])
    return list(zip(parts, np.split(fold, ends[:-1]), strict=True))


def _fit_factored(
    config: RewardModelConfig, data: PreparedData, seed: int, progress: Progress
) -> FactoredRewardModel:
    link = _link(config.link, data.facts.binary_reward)
    loss = Regression("cross_entropy" if link == "sigmoid" else "squared_error")
    towers: list[TwoTowerPolicy] = []
    for k in range(config.folds):
        seed_torch(seed, "reward towers", k)
        model = make_towers(config, data.context_encoding, data.item_encoding)
        towers.append(model.to(data.device))

    def of_batch(rows: EncodedRows) -> Callable[[TwoTowerPolicy], Tensor]:
        context = to_tensors(rows.context, data.device)
        item = data.items.at(tensor_of(rows.action))
        reward, over = tensor_of(rows.reward, data.device), Reduction(rows=len(rows.reward))

        def of_model(model: TwoTowerPolicy) -> Tensor:
            logit = model.action_logit(context, item)
            return loss(LoggedRows(reward, action_logit=logit), over).loss

        return of_model

    progress.start("fitting the reward model", config.epochs * data.train.num_rows)
    fit_out_of_fold(towers, of_batch, config, data, seed, "reward", progress)
    return FactoredRewardModel(towers, data.items, link, DEFAULT_CHUNK)


def fit_out_of_fold(
    models: Sequence[M],
    loss: Callable[[EncodedRows], Callable[[M], Tensor]],
    config: RewardModelConfig,
    data: PreparedData,
    seed: int,
    purpose: str,
    progress: Progress,
) -> None:
    """Train a model a fold on the rows of all other folds, in one pass over the log an epoch.

    Args:
        models: in training mode, one for each of config.folds; a single one learns from all rows.
        loss: of a batch, for each model; what models share is computed once.
        config: passes, batches, learning rate and decay.
        purpose: names the random streams of order and steps.
        progress: started by the caller; it advances by rows and is finished here.
    """
    folds = config.folds
    optimizers = [
        make_optimizer("adamw", model, config.learning_rate, config.weight_decay)
        for model in models
    ]
    order = EpochOrder(
        data.train.row_group_sizes,
        config.batch_size,
        seed=derive_seed(seed, f"{purpose} order"),
        num_folds=folds,
    )
    reader = BatchReader(
        data.train,
        data.catalogue,
        data.context_encoding,
        order,
        fold=None if folds == 1 else lambda rows: reward_folds(rows, folds, seed),
        on_bad_rows=data.on_bad_rows,
        quarantine=data.quarantine_of("train"),
    )
    with reader:
        for epoch in range(config.epochs):
            for cursor, rows, fold in reader.epoch(epoch):
                of_batch = loss(rows)
                for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                    if folds > 1 and k == fold:
                        continue
                    seed_torch(seed, f"{purpose} step", k, epoch, cursor.window, cursor.batch)
                    value = of_batch(model)
                    optimizer.zero_grad(set_to_none=True)
                    value.backward()
                    optimizer.step()
                progress.advance(len(rows.reward))
    progress.finish()


def _link(configured: Literal["auto", "identity", "sigmoid"], binary: bool) -> Link:
    if configured == "auto":
        return "sigmoid" if binary else "identity"
    return configured
