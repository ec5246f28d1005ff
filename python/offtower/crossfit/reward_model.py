"""Fit the reward model of a run, cross-fitted on the training log, or restore it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from offtower.checksums import checked_directory, is_complete, verify_directory
from offtower.config import RewardModelConfig
from offtower.crossfit.loop import FitPlan, FitStep, FoldModel, ModelLoss, fit_out_of_fold
from offtower.data.encoding import FeatureEncoding, take, tensor_of, to_tensors
from offtower.data.order import EpochOrder, fold_of
from offtower.data.rows import EncodedRows, relative_weights
from offtower.errors import RunError
from offtower.models.items import DEFAULT_CHUNK, ItemFeatures
from offtower.models.optimizer import make_optimizer
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.reward.dense import (
    DenseRewardModel,
    PairDesign,
    check_size,
    fit_estimator,
)
from offtower.models.reward.examination import Examination, reward_by_position
from offtower.models.reward.factored import FactoredRewardModel, Link, make_towers
from offtower.objectives import ItemScores, LoggedRows, Reduction, Regression
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed, seed_torch

SCAN_ROWS = 8192
_REMEDY = "restore the folder from a copy, or remove it: the reward model is then fitted again"


def reward_folds(rows: EncodedRows, folds: int, seed: int) -> np.ndarray:
    """(n,) fold of each row, by user where the log has users, else by round or row number."""
    return fold_of(rows.unit_key, folds, derive_seed(seed, "folds"))


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
    seed the fit is bit-identical, so a run killed before the model was stored fits it again.

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
    """Load a factored reward model that a run stored, for the catalogue `items`."""
    verify_directory(directory, _REMEDY)
    return FactoredRewardModel.restore(
        directory, config, context_encoding, item_encoding, items, DEFAULT_CHUNK
    )


def fit_plan(
    config: RewardModelConfig, data: PreparedData, seed: int, stream: str, label: str
) -> FitPlan:
    """The passes over the log that fit models in the folds of the reward model."""
    folds = config.folds
    order = EpochOrder(
        data.train.row_group_sizes,
        config.batch_size,
        seed=derive_seed(seed, f"{stream} order"),
        num_folds=folds,
    )
    return FitPlan(
        order,
        fold=None if folds == 1 else lambda rows: reward_folds(rows, folds, seed),
        epochs=config.epochs,
        seed=seed,
        label=label,
        stream=f"{stream} step",
    )


def fold_models(modules: Sequence[nn.Module], config: RewardModelConfig) -> list[FoldModel]:
    """One module per fold with the optimizer of the reward model; a single one sees all rows."""
    return [
        FoldModel(
            make_optimizer("adamw", module, config.learning_rate, config.weight_decay),
            held_out=None if config.folds == 1 else k,
            stream=k,
        )
        for k, module in enumerate(modules)
    ]


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


def _fit_factored(
    config: RewardModelConfig, data: PreparedData, seed: int, progress: Progress
) -> FactoredRewardModel:
    link = _link(config.link, data.facts.binary_reward)
    loss = Regression("cross_entropy" if link == "sigmoid" else "squared_error")
    towers: list[TwoTowerPolicy] = []
    by_position = reward_by_position(data.train)
    examinations: list[Examination] = []
    for k in range(config.folds):
        seed_torch(seed, "reward towers", k)
        model = make_towers(config, data.context_encoding, data.item_encoding)
        towers.append(model.to(data.device))
        if by_position is not None:
            examinations.append(Examination(by_position).to(data.device))

    def losses(step: FitStep) -> ModelLoss:
        rows = step.batch.rows
        context = to_tensors(rows.context, data.device)
        item = data.items.at(tensor_of(rows.action))
        reward = tensor_of(rows.reward, data.device)
        weight = relative_weights(rows, data.facts.mean_row_weight, data.device)
        reduction = Reduction(rows=len(rows), row_weight=weight)

        def loss_of(k: int) -> Tensor:
            logit = towers[k].action_logit(context, item)
            if examinations:
                assert rows.position is not None, "slates have positions"
                position = tensor_of(rows.position, data.device)
                per_row = examinations[k].loss(logit, reward, position, binary=link == "sigmoid")
                return reduction.mean(per_row)
            return loss(LoggedRows(reward, ItemScores(logit)), reduction).loss

        return loss_of

    plan = fit_plan(config, data, seed, "reward", "fitting the reward model")
    modules: list[nn.Module] = list(towers)
    if examinations:
        modules = [nn.ModuleList(pair) for pair in zip(towers, examinations, strict=True)]
    fit_out_of_fold(data, plan, fold_models(modules, config), losses, progress)
    factors = None
    if by_position is not None:
        every = torch.arange(len(by_position), device=data.device)
        with torch.no_grad():
            factors = torch.stack([one.at(every) for one in examinations]).mean(0).exp()
    return FactoredRewardModel(towers, data.items, link, DEFAULT_CHUNK, factors)


def _link(configured: Literal["auto", "identity", "sigmoid"], binary: bool) -> Link:
    if configured == "auto":
        return "sigmoid" if binary else "identity"
    return configured
