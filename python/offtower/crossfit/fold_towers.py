"""The towers of a factored reward model, which are fitted fold by fold on any process.

A fold's towers depend on its seeds and on the rows outside it, not on which other folds are fitted
beside it (`crossfit.loop`), so folds that several workers fitted are those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offtower.checksums import checked_directory, is_complete, verify_directory
from offtower.config import RewardModelConfig
from offtower.crossfit.loop import FitPlan, FitStep, FoldModel, ModelLoss, fit_out_of_fold
from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.order import EpochOrder, fold_of
from offtower.data.rows import EncodedRows, relative_weights
from offtower.models.items import DEFAULT_CHUNK
from offtower.models.optimizer import make_optimizer
from offtower.models.reward.examination import Examination, reward_by_position
from offtower.models.reward.factored import FactoredRewardModel, Link, make_towers
from offtower.models.store import load_weights, save_weights
from offtower.objectives import ItemScores, LoggedRows, Reduction, Regression
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed, seed_torch

_WEIGHTS = "towers.safetensors"
_REMEDY = "remove the folder: the fold is then fitted again"


def reward_folds(rows: EncodedRows, folds: int, seed: int) -> NDArray[np.int8]:
    """(n,) fold of each row, by user where the log has users, else by round or row number."""
    return fold_of(rows.unit_key, folds, derive_seed(seed, "folds"))


class FoldTowers(nn.Module):
    """Two towers that saw all rows outside one fold.

    Args:
        by_position: (K,) as `reward_by_position`; None for a log without slates.
    """

    def __init__(
        self, config: RewardModelConfig, data: PreparedData, by_position: Tensor | None
    ) -> None:
        super().__init__()
        self.tower = make_towers(config, data.context_encoding, data.item_encoding)
        self.examination = None if by_position is None else Examination(by_position.numpy())


class FoldFits:
    """Fits, stores and joins the folds of a run's factored reward model."""

    def __init__(self, config: RewardModelConfig, data: PreparedData, seed: int) -> None:
        self._config, self._data, self._seed = config, data, seed
        by_position = reward_by_position(data.train)
        self._by_position = None if by_position is None else torch.from_numpy(by_position)
        self._link: Link = _link(config.link, data.facts.binary_reward)

    def fit(self, progress: Progress, folds: Sequence[int] | None = None) -> list[FoldTowers]:
        """Fit some folds side by side, in one pass over the log per epoch; all by default."""
        config, data, link = self._config, self._data, self._link
        folds = range(config.folds) if folds is None else folds
        loss = Regression("cross_entropy" if link == "sigmoid" else "squared_error")
        models = [self._begun(fold) for fold in folds]

        def losses(step: FitStep) -> ModelLoss:
            rows = step.batch.rows
            context = to_tensors(rows.context, data.device)
            item = data.items.at(tensor_of(rows.action))
            reward = tensor_of(rows.reward, data.device)
            weight = relative_weights(rows, data.facts.mean_row_weight, data.device)
            reduction = Reduction(rows=len(rows), row_weight=weight)

            def loss_of(index: int) -> Tensor:
                logit = models[index].tower.action_logit(context, item)
                examination = models[index].examination
                if examination is None:
                    return loss(LoggedRows(reward, ItemScores(logit)), reduction).loss
                assert rows.position is not None, "slates have positions"
                position = tensor_of(rows.position, data.device)
                binary = link == "sigmoid"
                return reduction.mean(examination.loss(logit, reward, position, binary=binary))

            return loss_of

        plan = fit_plan(config, data, self._seed, "reward", "fitting the reward model")
        fitted = fold_models(dict(zip(folds, models, strict=True)), config)
        fit_out_of_fold(data, plan, fitted, losses, progress)
        return models

    def store(self, directory: Path, progress: Progress, folds: Sequence[int]) -> None:
        """Fit those of `folds` that are not below `directory`, and write each as a folder."""
        missing = [fold for fold in folds if not is_complete(_folder(directory, fold))]
        if not missing:
            return
        directory.mkdir(parents=True, exist_ok=True)
        for fold, model in zip(missing, self.fit(progress, missing), strict=True):
            with checked_directory(_folder(directory, fold)) as temporary:
                save_weights(temporary / _WEIGHTS, model)

    def stored(self, directory: Path) -> list[FoldTowers] | None:
        """Return all folds that `store` wrote, on any workers; None where one is missing.

        Raises:
            RunError: a file is damaged.
        """
        folders = [_folder(directory, fold) for fold in range(self._config.folds)]
        if not all(is_complete(folder) for folder in folders):
            return None
        models = []
        for folder in folders:
            verify_directory(folder, _REMEDY)
            model = self._towers()
            load_weights(folder / _WEIGHTS, model)
            models.append(model.to(self._data.device))
        return models

    def of_weights(self, weights: Sequence[dict[str, Tensor]]) -> list[FoldTowers]:
        """Return all folds by what `state_dict` of each was in another process."""
        models = []
        for state in weights:
            model = self._towers()
            model.load_state_dict(state)
            models.append(model.to(self._data.device))
        return models

    def joined(self, models: Sequence[FoldTowers]) -> FactoredRewardModel:
        """Return the reward model of all folds."""
        factors = None
        if self._by_position is not None:
            every = torch.arange(len(self._by_position), device=self._data.device)
            with torch.no_grad():
                logs = [one.examination.at(every) for one in models if one.examination is not None]
                factors = torch.stack(logs).mean(0).exp()
        towers = [one.tower for one in models]
        return FactoredRewardModel(towers, self._data.items, self._link, DEFAULT_CHUNK, factors)

    def _begun(self, fold: int) -> FoldTowers:
        seed_torch(self._seed, "reward towers", fold)
        return self._towers().to(self._data.device)

    def _towers(self) -> FoldTowers:
        return FoldTowers(self._config, self._data, self._by_position)


def _folder(directory: Path, fold: int) -> Path:
    return directory / f"fold_{fold}"


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


def fold_models(modules: dict[int, nn.Module], config: RewardModelConfig) -> list[FoldModel]:
    """Modules of some folds with the optimizer of the reward model; a single one sees all rows."""
    return [
        FoldModel(
            make_optimizer("adamw", module, config.learning_rate, config.weight_decay),
            held_out=None if config.folds == 1 else fold,
            stream=fold,
        )
        for fold, module in modules.items()
    ]


def _link(configured: Literal["auto", "identity", "sigmoid"], binary: bool) -> Link:
    if configured == "auto":
        return "sigmoid" if binary else "identity"
    return configured
