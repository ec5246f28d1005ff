"""The built-in search: what it draws, what it picks, what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offtower.config import Config, load_config
from offtower.errors import ConfigError, RunError
from offtower.training import tune as module
from offtower.training.run import train_run
from offtower.training.trainer import TrainingResult
from offtower.training.tune import DEFAULT_SPACE, draw_trials, load_space, trial_config, tune
from tests.mappers import BACKWARDS
from tests.training.conftest import make_config

SPACE = {
    "objective": [{"name": "regression"}, {"name": "weighted_likelihood"}, {"name": "dr"}],
    "training.epochs": [1],
    "training.learning_rate": [0.003, 0.01],
}


def test_trials_are_different_points_of_the_space() -> None:
    points = list(draw_trials(SPACE, 100, seed=0))
    assert len(points) == 6
    assert len({json.dumps(point) for point in points}) == 6
    assert list(draw_trials(SPACE, 2, seed=0)) == points[:2]
    assert list(draw_trials(SPACE, 6, seed=1)) != points


def test_every_objective_of_the_default_space_is_a_valid_run(
    simulated: Path, tmp_path: Path
) -> None:
    config = make_config(simulated, tmp_path, "x", reward_model={"kind": "none"})
    for number, overrides in enumerate(draw_trials(DEFAULT_SPACE, 10_000, seed=0)):
        trial = trial_config(config, number, overrides, 0.95)
        needs = trial.objective.name == "clipped_dr"
        assert trial.reward_model.kind == ("factored" if needs else "none")


def test_the_best_bound_wins_and_its_configuration_trains(simulated: Path, tmp_path: Path) -> None:
    config = make_config(simulated, tmp_path, "search")
    said: list[str] = []
    found = tune(config, space=SPACE, count=3, say=said.append)
    lows = [trial.low for trial in found.trials]
    assert lows == sorted(lows, reverse=True) and len(said) == 3
    stored = json.loads((found.folder / "trials.json").read_text())
    assert [trial["number"] for trial in stored] == [trial.number for trial in found.trials]
    best = load_config(found.folder / "best.yaml")
    assert best.name == "search" and best.evaluation.confidence == 0.95
    assert best.objective.name == found.best.overrides["objective"]["name"]
    # Each bound holds at the confidence of all three together, so alone it is higher.
    alone = train_run(best).validation
    assert alone is not None and found.best.low is not None and alone > found.best.low


def test_resumed_search_keeps_what_ended(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(simulated, tmp_path, "again")
    first = tune(config, space=SPACE, count=2)
    monkeypatch.setattr(module, "train_run", lambda *a, **k: pytest.fail("trained again"))
    assert tune(config, space=SPACE, count=2, resume=True) == first


def test_trials_on_workers_give_what_one_process_gives(simulated: Path, tmp_path: Path) -> None:
    here = tune(make_config(simulated, tmp_path / "here", "search"), space=SPACE, count=2)
    away = tune(
        make_config(simulated, tmp_path / "away", "search"),
        space=SPACE,
        count=2,
        execution=BACKWARDS,
    )
    assert away.trials == here.trials


def test_a_search_that_ran_is_not_run_over(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(simulated, tmp_path, "twice")
    tune(config, space=SPACE, count=1)
    monkeypatch.setattr(module, "train_run", lambda *a, **k: pytest.fail("trained again"))
    with pytest.raises(RunError, match="already holds a run of this configuration"):
        tune(config, space=SPACE, count=1)


def test_a_failed_trial_is_reported_and_the_others_continue(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(config: Config, **more: Any) -> TrainingResult:
        if config.objective.name == "dr":
            raise RunError("a loss of nan")
        return train_run(config, **more)

    monkeypatch.setattr(module, "train_run", diverging)
    space = {**SPACE, "training.learning_rate": [0.003]}
    found = tune(make_config(simulated, tmp_path, "some"), space=space, count=3)
    assert len(found.trials) == 3
    for trial in found.trials:
        failed = trial.overrides["objective"]["name"] == "dr"
        assert (trial.low is None) == failed and trial.error == (
            "a loss of nan" if failed else None
        )


def test_mistakes_are_explained(simulated: Path, tmp_path: Path) -> None:
    config = make_config(simulated, tmp_path, "bad")
    with pytest.raises(ConfigError, match=r"did you mean 'learning_rate'"):
        tune(config, space={"training.learning_rat": [1.0]}, count=1)
    config.data.validation = None
    with pytest.raises(ConfigError, match="needs a held-out log"):
        tune(config)
    path = tmp_path / "space.yaml"
    path.write_text("training.epochs: 3\n")
    with pytest.raises(ConfigError, match=r"'training\.epochs' needs a list"):
        load_space(path)
