"""What a judgement starts from: runs, and the reward models that estimators read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from offtower.config import (
    Config,
    RewardModelConfig,
    SelectionModel,
    apply_overrides,
    parse_config,
    to_dict,
)
from offtower.data.catalogue import Catalogue
from offtower.errors import ConfigError, OfftowerError
from offtower.evaluation.scoring.pair_models import fit_pair_model, linear_config, trees_config
from offtower.evaluation.scoring.policy import JudgingModel
from offtower.models.items import ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.fit import fit_reward_model, restore_reward_model
from offtower.models.store import load_policy
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress
from offtower.run_directory import RunDirectory

MAIN_FIT_ROWS = 1_000_000
"""Rows of the training log that a dense reward model of DM and DR learns from, at most."""
_TOWER_ROWS = 3_000_000
"""Rows that the towers fitted for a selection see, over all epochs."""


@dataclass
class OpenRun:
    """A finished run: its policy, and the catalogue in its encoding."""

    directory: RunDirectory
    config: Config
    policy: TwoTowerPolicy
    items: ItemFeatures
    trust_code: Collection[str] = ()
    """Import paths of code that stored files may name."""

    @property
    def name(self) -> str:
        return self.directory.path.name


def open_run(path: Path, catalogue: Catalogue, trust_code: Collection[str] = ()) -> OpenRun:
    """Load a run.

    Raises:
        RunError: it is not there or not finished, or names code that may not run.
    """
    directory = RunDirectory(path)
    config = directory.load_config(trust_code=trust_code)
    policy, _ = load_policy(directory.policy, trust_code=trust_code)
    items = ItemFeatures.from_catalogue(catalogue, policy.item_encoding)
    return OpenRun(directory, config, policy, items, trust_code)


def judged_by(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with changes to its section `evaluation`, and no others."""
    for override in overrides:
        if not override.startswith("evaluation."):
            raise ConfigError(
                f"override '{override}' would change what the run is; only keys of 'evaluation' "
                "can be changed where it is judged"
            )
    return parse_config(apply_overrides(to_dict(config), overrides), source="--set")


def distinct_names(runs: Sequence[OpenRun]) -> list[str]:
    """Folder names, or whole paths where two runs share one. Raises ConfigError for a run twice."""
    names = [run.name for run in runs]
    if len(set(names)) != len(names):
        names = [str(run.directory.path) for run in runs]
    if len(set(names)) != len(names):
        raise ConfigError(f"a run is named twice: {', '.join(names)}")
    return names


class ModelRoom:
    """Obtains reward models for a judgement; training logs are opened once, and only if needed."""

    def __init__(self, runs: Sequence[OpenRun], config: Config, progress: Progress) -> None:
        self._runs = runs
        self._config = config
        self._progress = progress
        self._data: dict[int, PreparedData] = {}

    def main(self) -> JudgingModel | None:
        """The model of DM and DR: evaluation.reward_model, or that of the first run with one."""
        wanted = self._config.evaluation.reward_model
        order = sorted(
            range(len(self._runs)), key=lambda i: not self._runs[i].directory.reward_model.exists()
        )
        for i in order:
            run = self._runs[i]
            config = wanted or run.config.reward_model
            if config.kind == "none":
                continue
            if config.kind == "dense":
                return self._pairs(_dense_name(config), i, config, MAIN_FIT_ROWS)
            stored = run.directory.reward_model
            if config == run.config.reward_model and stored.exists():
                encodings = (run.policy.context_encoding, run.policy.item_encoding)
                model = restore_reward_model(config, stored, *encodings, run.items)
                return JudgingModel("two_tower", i, exact=model)
            return self._towers(i, config)
        return None

    def for_selection(self, main: JudgingModel | None, notes: list[str]) -> list[JudgingModel]:
        """The models of the candidates; one that cannot be had is left out, with a note."""
        options = self._config.evaluation.selection
        owner = 0 if main is None else main.owner
        models = [] if main is None else [main]
        for kind in options.models:
            if main is not None and main.name == kind:
                continue
            try:
                models.append(self._fit(kind, owner))
            except OfftowerError as error:
                notes.append(f"candidates with the reward model '{kind}' left out: {error}")
        return models

    def _fit(self, kind: SelectionModel, owner: int) -> JudgingModel:
        options = self._config.evaluation.selection
        data = self._open(owner)
        if kind == "two_tower":
            epochs = min(20, max(1, round(_TOWER_ROWS / max(1, data.train.num_rows))))
            return self._towers(owner, RewardModelConfig(kind="factored", folds=1, epochs=epochs))
        make = linear_config if kind == "linear" else trees_config
        return self._pairs(kind, owner, make(data.facts.binary_reward), options.fit_rows)

    def _pairs(
        self, name: str, owner: int, config: RewardModelConfig, max_rows: int
    ) -> JudgingModel:
        self._progress.start(f"fitting the reward model ({name})", None)
        model = fit_pair_model(config, self._open(owner), self._runs[owner].config.seed, max_rows)
        self._progress.finish()
        return JudgingModel(name, owner, pairs=model)

    def _towers(self, owner: int, config: RewardModelConfig) -> JudgingModel:
        data = self._open(owner)
        model = fit_reward_model(config, data, self._runs[owner].config.seed, self._progress)
        return JudgingModel("two_tower", owner, exact=model)

    def _open(self, owner: int) -> PreparedData:
        if owner not in self._data:
            run = self._runs[owner]
            self._data[owner] = open_data(run.config, self._progress, run.directory.path)
        return self._data[owner]


def _dense_name(config: RewardModelConfig) -> str:
    return "trees" if "GradientBoosting" in config.estimator else "dense"
