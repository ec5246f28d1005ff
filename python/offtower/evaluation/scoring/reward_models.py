"""The reward models of an evaluation: restored from a run, or fitted on its training log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offtower.checksums import is_complete
from offtower.config import Config, RewardModelConfig, SelectionModel
from offtower.crossfit.fold_towers import FoldFits
from offtower.crossfit.reward_model import restore_reward_model
from offtower.errors import OfftowerError
from offtower.evaluation.run_loading import OpenRun
from offtower.evaluation.scoring.pair_models import (
    fit_pair_estimator,
    linear_config,
    pair_model,
    trees_config,
)
from offtower.evaluation.scoring.rewards import EvaluationModel
from offtower.execution import LOCAL, Execution
from offtower.models.items import DEFAULT_CHUNK
from offtower.models.reward.factored import FactoredRewardModel
from offtower.models.store import load_policy
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress
from offtower.run_directory import RunDirectory

MAX_DENSE_FIT_ROWS = 1_000_000
"""Rows of the training log that a dense reward model of DM and DR learns from, at most."""
_TOWER_ROWS = 3_000_000
"""Rows that two towers fitted for a selection see, over all epochs."""


class RewardModelProvider:
    """Restores or fits reward models; training logs are opened once, and only where needed.

    Args:
        execution: where its mapper runs in other processes, folds and models are fitted there, each
            as one part, to the bits of one process.
    """

    def __init__(
        self, runs: Sequence[OpenRun], config: Config, execution: Execution = LOCAL
    ) -> None:
        self._runs = runs
        self._config = config
        self._progress, self._mapper = execution.progress, execution.mapper
        self._data: dict[int, PreparedData] = {}

    def main(self) -> EvaluationModel | None:
        """The model of DM and DR: evaluation.reward_model, or that of the first run with one, or
        the regression that objective=auto fitted."""
        runs = self._runs
        for i in sorted(
            range(len(runs)), key=lambda i: not runs[i].directory.reward_model.exists()
        ):
            run = runs[i]
            config = self._config.evaluation.reward_model or run.config.reward_model
            if config.kind == "none":
                continue
            if config.kind == "dense":
                name = "trees" if "GradientBoosting" in config.estimator else "dense"
                fit = ModelFit(name, config, max_rows=MAX_DENSE_FIT_ROWS)
                return self._made(i, fit, fit.on(self._open(i), self._seed(i), self._progress))
            stored = run.directory.reward_model
            if config == run.config.reward_model and stored.exists():
                encodings = (run.policy.context_encoding, run.policy.item_encoding)
                model = restore_reward_model(config, stored, *encodings, run.items)
                return EvaluationModel("two_tower", i, model)
            return self._fit_towers(i, config)
        # A reward model that is set, also to none, comes first.
        return None if self._config.evaluation.reward_model is not None else self._of_auto()

    def _of_auto(self) -> EvaluationModel | None:
        """The regression candidate of the first run of objective=auto that stored one."""
        for i, run in enumerate(self._runs):
            stored = run.directory.auto_reward_model
            if is_complete(stored):
                policy, facts = load_policy(stored, trust_code=run.trust_code)
                towers = policy.to(run.items.device)
                model = FactoredRewardModel([towers], run.items, facts["link"], DEFAULT_CHUNK)
                return EvaluationModel("two_tower", i, model)
        return None

    def for_selection(
        self, main: EvaluationModel | None
    ) -> tuple[list[EvaluationModel], list[str]]:
        """The candidates' models, `main` first, and a note on each that could not be fitted."""
        owner = 0 if main is None else main.owner
        models = [] if main is None else [main]
        notes = []
        kinds = [
            kind
            for kind in self._config.evaluation.selection.models
            if main is None or main.name != kind
        ]
        fits = [self._fit(kind, owner) for kind in kinds]
        if self._mapper.distributed:
            results = self._elsewhere(owner, fits)
        else:
            here = (self._open(owner), self._seed(owner), self._progress)
            results = [_outcome(fit, *here) for fit in fits]
        for fit, result in zip(fits, results, strict=True):
            if isinstance(result, OfftowerError):
                notes.append(f"candidates with the reward model '{fit.name}' left out: {result}")
            else:
                models.append(self._made(owner, fit, result))
        return models, notes

    def _fit(self, kind: SelectionModel, owner: int) -> ModelFit:
        data = self._open(owner)
        if kind == "two_tower":
            epochs = min(20, max(1, round(_TOWER_ROWS / max(1, data.train.num_rows))))
            config = RewardModelConfig(kind="factored", folds=1, epochs=epochs)
            return ModelFit(kind, config, folds=(0,))
        make = linear_config if kind == "linear" else trees_config
        rows = self._config.evaluation.selection.fit_rows
        return ModelFit(kind, make(data.facts.binary_reward), max_rows=rows)

    def _fit_towers(self, owner: int, config: RewardModelConfig) -> EvaluationModel:
        folds = range(config.folds)
        if self._mapper.distributed:
            fits = [ModelFit("two_tower", config, folds=(fold,)) for fold in folds]
            parts = self._elsewhere(owner, fits)
            failed = next((one for one in parts if isinstance(one, OfftowerError)), None)
            if failed is not None:
                raise failed
            weights = [state for one in parts for state in one]
        else:
            fit = ModelFit("two_tower", config, folds=tuple(folds))
            weights = fit.on(self._open(owner), self._seed(owner), self._progress)
        return self._made(owner, ModelFit("two_tower", config), weights)

    def _elsewhere(self, owner: int, fits: Sequence[ModelFit]) -> list[Any]:
        """What `_outcome` of each fit is in another process."""
        work = _FitOfRun(self._runs[owner], fits)
        return list(self._mapper.map(work, range(len(fits)), "fitting reward models"))

    def _made(self, owner: int, fit: ModelFit, result: Any) -> EvaluationModel:
        """The model of what a fit, or the fits of all folds, returned."""
        data = self._open(owner)
        if fit.config.kind == "dense":
            return EvaluationModel(fit.name, owner, pair_model(result, data))
        folds = FoldFits(fit.config, data, self._seed(owner))
        return EvaluationModel(fit.name, owner, folds.joined(folds.of_weights(result)))

    def _seed(self, owner: int) -> int:
        return self._runs[owner].config.seed

    def _open(self, owner: int) -> PreparedData:
        if owner not in self._data:
            run = self._runs[owner]
            self._data[owner] = open_data(run.config, self._progress, run.directory.path)
        return self._data[owner]


@dataclass(frozen=True)
class ModelFit:
    """A fit of a reward model on a run's training log.

    Attributes:
        name: of the model.
        folds: of a factored model's towers that are fitted.
        max_rows: of the log that a dense model learns from.
    """

    name: str
    config: RewardModelConfig
    folds: tuple[int, ...] = ()
    max_rows: int = 0

    def on(self, data: PreparedData, seed: int, progress: Progress) -> Any:
        """Return a fitted scikit-learn estimator, or the weights of each fold's towers."""
        if self.config.kind == "dense":
            progress.start(f"fitting the reward model ({self.name})", None)
            estimator = fit_pair_estimator(self.config, data, seed, self.max_rows)
            progress.finish()
            return estimator
        towers = FoldFits(self.config, data, seed).fit(progress, self.folds)
        return [{name: t.cpu() for name, t in one.state_dict().items()} for one in towers]


def _outcome(fit: ModelFit, data: PreparedData, seed: int, progress: Progress) -> Any:
    """What the fit returns, or the error for users that it raised."""
    try:
        return fit.on(data, seed, progress)
    except OfftowerError as error:
        return error


class _FitOfRun:
    """Fits by number, in processes that open the run's training log themselves."""

    def __init__(self, run: OpenRun, fits: Sequence[ModelFit]) -> None:
        self._path, self._trust, self._fits = run.directory.path.absolute(), run.trust_code, fits

    def __call__(self, number: int) -> Any:
        config = RunDirectory(self._path).load_config(trust_code=self._trust)
        data = open_data(config, Progress(), self._path)
        return _outcome(self._fits[number], data, config.seed, Progress())
