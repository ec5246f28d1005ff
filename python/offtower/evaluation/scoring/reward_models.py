"""The reward models of an evaluation: restored from a run, or fitted on its training log."""

from __future__ import annotations

from collections.abc import Sequence

from offtower.checksums import is_complete
from offtower.config import Config, RewardModelConfig, SelectionModel
from offtower.crossfit.reward_model import fit_reward_model, restore_reward_model
from offtower.errors import OfftowerError
from offtower.evaluation.run_loading import OpenRun
from offtower.evaluation.scoring.pair_models import fit_pair_model, linear_config, trees_config
from offtower.evaluation.scoring.rewards import EvaluationModel
from offtower.models.items import DEFAULT_CHUNK
from offtower.models.reward.factored import FactoredRewardModel
from offtower.models.store import load_policy
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress

MAX_DENSE_FIT_ROWS = 1_000_000
"""Rows of the training log that a dense reward model of DM and DR learns from, at most."""
_TOWER_ROWS = 3_000_000
"""Rows that two towers fitted for a selection see, over all epochs."""


class RewardModelProvider:
    """Restores or fits reward models; training logs are opened once, and only where needed."""

    def __init__(self, runs: Sequence[OpenRun], config: Config, progress: Progress) -> None:
        self._runs = runs
        self._config = config
        self._progress = progress
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
                return self._fit_pairs(name, i, config, MAX_DENSE_FIT_ROWS)
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
        for kind in self._config.evaluation.selection.models:
            if main is not None and main.name == kind:
                continue
            try:
                models.append(self._fit(kind, owner))
            except OfftowerError as error:
                notes.append(f"candidates with the reward model '{kind}' left out: {error}")
        return models, notes

    def _fit(self, kind: SelectionModel, owner: int) -> EvaluationModel:
        data = self._open(owner)
        if kind == "two_tower":
            epochs = min(20, max(1, round(_TOWER_ROWS / max(1, data.train.num_rows))))
            return self._fit_towers(
                owner, RewardModelConfig(kind="factored", folds=1, epochs=epochs)
            )
        make = linear_config if kind == "linear" else trees_config
        config, rows = make(data.facts.binary_reward), self._config.evaluation.selection.fit_rows
        return self._fit_pairs(kind, owner, config, rows)

    def _fit_pairs(
        self, name: str, owner: int, config: RewardModelConfig, max_rows: int
    ) -> EvaluationModel:
        self._progress.start(f"fitting the reward model ({name})", None)
        model = fit_pair_model(config, self._open(owner), self._runs[owner].config.seed, max_rows)
        self._progress.finish()
        return EvaluationModel(name, owner, model)

    def _fit_towers(self, owner: int, config: RewardModelConfig) -> EvaluationModel:
        seed = self._runs[owner].config.seed
        model = fit_reward_model(config, self._open(owner), seed, self._progress)
        return EvaluationModel("two_tower", owner, model)

    def _open(self, owner: int) -> PreparedData:
        if owner not in self._data:
            run = self._runs[owner]
            self._data[owner] = open_data(run.config, self._progress, run.directory.path)
        return self._data[owner]
