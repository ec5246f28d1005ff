"""Fit the reward model of a run, cross-fitted on the training log, or restore it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from offtower.checksums import checked_directory, is_complete, verify_directory
from offtower.config import RewardModelConfig
from offtower.crossfit.fold_towers import FoldFits, reward_folds
from offtower.data.encoding import FeatureEncoding, take
from offtower.errors import RunError
from offtower.models.items import DEFAULT_CHUNK, ItemFeatures
from offtower.models.reward.base import RewardModel
from offtower.models.reward.dense import (
    DenseRewardModel,
    PairDesign,
    check_size,
    fit_estimator,
)
from offtower.models.reward.factored import FactoredRewardModel
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed

SCAN_ROWS = 8192
_REMEDY = "restore the folder from a copy, or remove it: the reward model is then fitted again"


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

    Returns None where the configuration has no reward model. With equal data, configuration and
    seed the fit is bit-identical, so a run killed before the model was stored fits it again, unless
    `store_folds` has stored all of its folds.

    Args:
        for_new_rows: the model must also predict rows of other logs.
    """
    if config.kind == "none":
        return None
    stored = directory is not None and is_complete(directory)
    if stored and config.kind == "dense" and for_new_rows:
        # Regressors are never stored (that takes a pickle): fit them again, to the same bits.
        return fit_reward_model(config, data, seed, progress)
    if directory is not None and stored:
        if config.kind == "dense":
            verify_directory(directory, _REMEDY)
            return DenseRewardModel.restore(directory, _design(data), config.folds, data.device)
        return restore_reward_model(
            config, directory, data.context_encoding, data.item_encoding, data.items
        )
    folds = None if directory is None else _folds(directory)
    model = fit_reward_model(config, data, seed, progress, folds)
    if directory is not None:
        with checked_directory(directory) as temporary:
            model.save(temporary)
        shutil.rmtree(_folds(directory), ignore_errors=True)
    return model


def store_folds(
    config: RewardModelConfig,
    data: PreparedData,
    seed: int,
    progress: Progress,
    directory: Path,
    worker: tuple[int, int],
) -> None:
    """Fit this worker's folds of the reward model that `obtain_reward_model` then stores.

    Worker r of R has the folds r, r + R, ...; each reads the log and fits them as one process does,
    to the same bits. A dense reward model, of few items, is left to `obtain_reward_model`.

    Args:
        directory: as for `obtain_reward_model`, seen by all workers.
        worker: r and R.
    """
    if config.kind != "factored" or is_complete(directory):
        return
    folds = range(worker[0], config.folds, worker[1])
    FoldFits(config, data, seed).store(_folds(directory), progress, folds)


def _folds(directory: Path) -> Path:
    """Folder of the folds that are not joined yet to the reward model at `directory`."""
    return directory.with_name(f"{directory.name}.folds")


def fit_reward_model(
    config: RewardModelConfig,
    data: PreparedData,
    seed: int,
    progress: Progress,
    stored: Path | None = None,
) -> RewardModel:
    """Fit q(x, a) on the training log, or join its folds at `stored` where all are there."""
    if config.kind == "dense":
        return _fit_dense(config, data, seed, progress)
    fits = FoldFits(config, data, seed)
    folds = None if stored is None else fits.stored(stored)
    return fits.joined(fits.fit(progress) if folds is None else folds)


def restore_reward_model(
    config: RewardModelConfig,
    directory: Path,
    context_encoding: FeatureEncoding,
    item_encoding: FeatureEncoding,
    items: ItemFeatures,
) -> FactoredRewardModel:
    """Load a factored reward model that a run stored, for the catalogue `items`."""
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
    parts = list(data.scan(SCAN_ROWS))
    pairs = np.concatenate([design.logged(part) for part in parts])
    reward = np.concatenate([part.reward for part in parts]).astype(np.float64)
    fold = np.concatenate([reward_folds(part, config.folds, seed) for part in parts])
    weight = None
    if parts[0].row_weight is not None:
        weight = np.concatenate([part.row_weight for part in parts if part.row_weight is not None])
    progress.start("fitting the reward model", config.folds)
    estimators = []
    for k in range(config.folds):
        chosen = np.ones(len(fold), dtype=bool) if config.folds == 1 else fold != k
        if not chosen.any() or not (fold == k).any():
            raise RunError(
                f"the log's {len(fold)} rows (or users) do not fill {config.folds} folds; "
                "lower reward_model.folds"
            )
        fold_seed = derive_seed(seed, "reward model", k)
        chosen_weight = None if weight is None else weight[chosen]
        estimators.append(
            fit_estimator(config, fold_seed, pairs[chosen], reward[chosen], chosen_weight)
        )
        progress.advance(1)
    progress.finish()
    rows = int(max(part.row.max() for part in parts)) + 1
    values = np.empty((rows, data.catalogue.num_items), dtype=np.float32)
    progress.start("predicting rewards", len(fold))
    ends = np.cumsum([len(part) for part in parts])
    for part, folds in zip(parts, np.split(fold, ends[:-1]), strict=True):
        for k in np.unique(folds):
            index = np.flatnonzero(folds == k)
            values[part.row[index]] = design.predict(estimators[k], take(part.context, index))
        progress.advance(len(folds))
    progress.finish()
    return DenseRewardModel(estimators, design, values, data.device)
