"""The built-in search: what it draws, what it picks, what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from offtower.config import Config, TrainingConfig, load_config
from offtower.errors import ClusterError, ConfigError, RunError
from offtower.execution import Execution
from offtower.metrics import read_metrics
from offtower.training import tune as module
from offtower.training.halving import Rung, best, rungs
from offtower.training.run import train_run
from offtower.training.trainer import TrainingResult
from offtower.training.tune import (
    DEFAULT_SPACE,
    Search,
    Trial,
    TuneResult,
    draw_trials,
    load_space,
    trial_config,
    tune,
)
from tests.mappers import BACKWARDS, BackwardsMapper
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
    found = tune(config, Search(SPACE, 3), say=said.append)
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
    first = tune(config, Search(SPACE, 2))
    monkeypatch.setattr(module, "train_run", lambda *a, **k: pytest.fail("trained again"))
    assert tune(config, Search(SPACE, 2), resume=True) == first
    with pytest.raises(RunError, match=r"reduction factor of 3, and this one has 2.*factor 3"):
        tune(config, Search(SPACE, 2, reduction_factor=2), resume=True)


def test_trials_on_workers_give_what_one_process_gives(simulated: Path, tmp_path: Path) -> None:
    here = tune(make_config(simulated, tmp_path / "here", "search"), Search(SPACE, 2))
    away = tune(
        make_config(simulated, tmp_path / "away", "search"),
        Search(SPACE, 2),
        execution=BACKWARDS,
    )
    assert away.trials == here.trials


def test_a_search_that_ran_is_not_run_over(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(simulated, tmp_path, "twice")
    tune(config, Search(SPACE, 1))
    monkeypatch.setattr(module, "train_run", lambda *a, **k: pytest.fail("trained again"))
    with pytest.raises(RunError, match="already holds a run of this configuration"):
        tune(config, Search(SPACE, 1))


def test_a_failed_trial_is_reported_and_the_others_continue(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(config: Config, **more: Any) -> TrainingResult:
        if config.objective.name == "dr":
            raise RunError("a loss of nan")
        return train_run(config, **more)

    monkeypatch.setattr(module, "train_run", diverging)
    space = {**SPACE, "training.learning_rate": [0.003]}
    found = tune(make_config(simulated, tmp_path, "some"), Search(space, 3))
    assert len(found.trials) == 3
    for trial in found.trials:
        failed = trial.overrides["objective"]["name"] == "dr"
        assert (trial.low is None) == failed and trial.error == (
            "a loss of nan" if failed else None
        )


def test_mistakes_are_explained(simulated: Path, tmp_path: Path) -> None:
    config = make_config(simulated, tmp_path, "bad")
    with pytest.raises(ConfigError, match=r"did you mean 'learning_rate'"):
        tune(config, Search({"training.learning_rat": [1.0]}, 1))
    config.data.validation = None
    with pytest.raises(ConfigError, match="needs a held-out log"):
        tune(config)
    path = tmp_path / "space.yaml"
    path.write_text("training.epochs: 3\n")
    with pytest.raises(ConfigError, match=r"'training\.epochs' needs a list"):
        load_space(path)


def test_rungs_end_with_whole_validations_and_keep_one_in_some_trials() -> None:
    def settings(epochs: int, every: int = 1) -> TrainingConfig:
        return TrainingConfig(epochs=epochs, validate_every_epochs=every)

    def plan(trials: list[TrainingConfig], factor: int) -> list[tuple[int, int]]:
        return [(rung.trials, rung.epochs(trials[0])) for rung in rungs(trials, factor)]

    assert plan([settings(20)] * 20, 3) == [(20, 3), (7, 7), (3, 20)]
    assert plan([settings(20)] * 20, 1) == [(20, 20)]
    assert plan([settings(20, every=4)] * 9, 3) == [(9, 4), (3, 8), (1, 20)]
    # Rungs of the same epochs are one; two trials are too few for a rung.
    assert plan([settings(3)] * 20, 3) == [(20, 1), (7, 3)]
    assert plan([settings(1)] * 20, 3) == [(20, 1)]
    assert plan([settings(20)] * 2, 3) == [(2, 20)]
    mixed = [settings(1), settings(9)]
    assert [Rung(Fraction(1, 3), 2).epochs(one) for one in mixed] == [1, 3]
    assert best([0.1, None, 0.5, 0.5, 0.2], 2) == [2, 3]
    assert best([None, 0.1], 3) == [1]


def test_trials_in_pieces_are_trials_at_once_and_a_killed_search_continues(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds of halving, by what the same trials wrote when each was trained to its end."""
    space = {
        "objective": [{"name": "weighted_likelihood"}],
        "training.epochs": [3],
        "training.learning_rate": [0.0003, 0.003, 0.03],
    }

    def search(name: str, factor: int, **more: Any) -> TuneResult:
        return tune(make_config(simulated, tmp_path / name, "s"), Search(space, 3, factor), **more)

    whole = {trial.number: trial for trial in search("whole", 1).trials}
    calls: list[str] = []

    def counted(config: Config, **more: Any) -> TrainingResult:
        calls.append(config.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_run(config, **more)

    monkeypatch.setattr(module, "train_run", counted)
    with pytest.raises(KeyboardInterrupt):
        search("killed", 3)
    found = search("killed", 3, resume=True)
    assert len(calls) == 5  # The killed trial, and the one of the second rung.
    assert [trial.stopped for trial in found.trials] == [False, True, True]
    assert (found.epochs, [trial.epochs for trial in found.trials]) == (9, [3, 1, 1])
    assert found.best == whole[found.best.number]
    at_rung = {}
    for number in whole:
        lines = read_metrics(tmp_path / "whole" / f"s-tune-{number:03d}" / "metrics.jsonl")
        first = next(line for line in lines if line["kind"] == "epoch")
        at_rung[number] = first["validation"]["simultaneous_low"]
    assert found.best.number == max(at_rung, key=lambda number: at_rung[number])
    assert all(trial.low == at_rung[trial.number] for trial in found.trials[1:])
    with pytest.raises(RunError, match="another number of trials"):
        tune(make_config(simulated, tmp_path / "killed", "s"), Search(space, 2), resume=True)


def test_a_trial_whose_workers_die_fails_alone(simulated: Path, tmp_path: Path) -> None:
    class Mortal(BackwardsMapper):
        def map(
            self, function: Any, parts: Any, task: str = "", *, on_lost: Any = None
        ) -> Iterator[Any]:
            for part in parts:
                if part[0] == 1:
                    yield on_lost(part, ClusterError("out of memory"))
                else:
                    yield function(part)

    config = make_config(simulated, tmp_path, "mortal")
    found = tune(config, Search(SPACE, 2), execution=Execution(Mortal()))
    assert [trial.number for trial in found.trials] == [0, 1]
    assert found.trials[1] == Trial(1, found.trials[1].overrides, None, "out of memory")
