"""objective=auto: races within a budget, through whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offtower import TwoTowerPolicyLearner
from offtower.benchmarks.quality.bilinear import BilinearWorld
from offtower.config import Config
from offtower.errors import ConfigError
from offtower.metrics import read_metrics
from offtower.models.store import load_policy
from offtower.training.auto.plan import AutoPlan, read_plan
from offtower.training.run import train_run
from tests.mappers import BACKWARDS
from tests.training.conftest import make_config
from tests.training.test_auto_budget import NAMES, Machine


def raced(simulated: Path, runs: Path, name: str, **auto: Any) -> Config:
    settings = {"batch_size": 64, "folds": 2, "budget": 0.5, "candidates": NAMES[:4], **auto}
    return make_config(
        simulated,
        runs,
        name,
        objective={"name": "auto"},
        auto=settings,
        sampling={"num_samples": 2},
    )


@pytest.fixture(scope="module")
def race(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of two rungs with sampled terms."""
    config = raced(simulated, tmp_path_factory.mktemp("race"), "race")
    with pytest.MonkeyPatch.context() as patch:
        Machine(patch, step=0.06)
        # As if training took as long as planned, however long it takes here.
        patch.setattr(AutoPlan, "revise", slower(1.0))
        train_run(config)
    return config


def assert_same_policies(one: Path, two: Path) -> None:
    first, second = (load_policy(run / "policy")[0].state_dict() for run in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_race_reports_its_stages_and_who_left(race: Config) -> None:
    report = read_metrics(race.run_directory / "metrics.jsonl")[0]
    assert report["plan"]["terms"] == "sampled" and report["plan"]["bounded"]
    assert [len(stage["candidates"]) for stage in report["stages"]] == [4, 2]
    assert len(report["dropped"]) == 2
    assert {"held-out", "value"} == {text.split()[0] for text in report["dropped"].values()}
    assert set(report["candidates"]) <= set(report["stages"][-1]["candidates"])
    assert report["rows"] == report["rows_of_log"] and report["seconds"] > 0
    stored = json.loads((race.run_directory / "auto" / "plan.json").read_text())
    assert stored["candidates"] == report["plan"]["candidates"]


def test_a_killed_race_goes_on_with_its_plan(
    race: Config, simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second rung, on a machine that is faster by now."""
    again = raced(simulated, tmp_path, "race")
    shutil.copytree(race.run_directory, again.run_directory)
    for name in ("auto/out_of_fold_2", "auto/refit", "policy"):
        shutil.rmtree(again.run_directory / name)
    machine = Machine(monkeypatch, step=1e-6, row=1e-9)
    before = read_plan(again.run_directory)
    assert before.revised == 1
    train_run(again, resume=True)
    assert machine.measured == 0
    assert read_plan(again.run_directory) == before
    assert_same_policies(race.run_directory, again.run_directory)


def slower(factor: float) -> Callable[..., AutoPlan]:
    revise = AutoPlan.revise

    def found(
        plan: AutoPlan, training: Sequence[float], _: Sequence[float], left: Sequence[str]
    ) -> AutoPlan:
        done = plan.rungs[: len(training)]
        return revise(
            plan,
            [factor * one.training_seconds for one in done],
            [one.evaluation_seconds for one in done],
            left,
        )

    return found


@pytest.mark.parametrize("ends", [True, False])
def test_a_race_killed_after_a_revision_goes_on_with_it(
    ends: bool, simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run takes longer than its plan; the second one, resumed, does not."""
    Machine(monkeypatch, step=0.06)
    config = raced(simulated, tmp_path / "first", "race", candidates=NAMES[1:4])
    with pytest.MonkeyPatch.context() as patch:
        # As if training took longer than planned, however long it takes here.
        patch.setattr(AutoPlan, "revise", slower(2.0 if ends else 1.3))
        train_run(config)
    revised = read_plan(config.run_directory)
    assert revised.revised == 1 and len(revised.rungs) == (1 if ends else 2)
    assert ends or revised.rungs[1].share < 0.5
    report = read_metrics(config.run_directory / "metrics.jsonl")[0]
    assert report["chosen"] in report["candidates"]
    again = raced(simulated, tmp_path / "second", "race", candidates=NAMES[1:4])
    shutil.copytree(config.run_directory, again.run_directory)
    for name in ("auto/out_of_fold_2", "auto/refit", "policy"):
        shutil.rmtree(again.run_directory / name, ignore_errors=True)
    train_run(again, resume=True)
    assert read_plan(again.run_directory) == revised
    assert_same_policies(config.run_directory, again.run_directory)


def test_members_without_their_plan_are_trained_anew(
    race: Config, simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a run that ended before the plan was sent."""
    again = raced(simulated, tmp_path, "race")
    shutil.copytree(race.run_directory, again.run_directory)
    (again.run_directory / "auto" / "plan.json").unlink()
    shutil.rmtree(again.run_directory / "policy")
    machine = Machine(monkeypatch, step=0.045)
    train_run(again, resume=True)
    assert machine.measured > 0
    plan = read_plan(again.run_directory)
    other = read_plan(race.run_directory)
    assert plan.candidates["likelihood"] != other.candidates["likelihood"]
    first, second = (
        load_file(run.run_directory / "auto/out_of_fold/likelihood/member_0/member.safetensors")
        for run in (race, again)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_the_plan_of_a_run_gives_its_policy_on_any_machine(
    race: Config, simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, step=1e-6, row=1e-9)
    other = raced(simulated, tmp_path, "elsewhere", plan=str(race.run_directory))
    train_run(other, execution=BACKWARDS)
    assert machine.measured == 0
    assert_same_policies(race.run_directory, other.run_directory)
    file = tmp_path / "plan.json"
    file.write_text((race.run_directory / "auto" / "plan.json").read_text().replace("64", "65"))
    with pytest.raises(ConfigError, match="damaged or was changed"):
        read_plan(file)
    with pytest.raises(ConfigError, match=r"auto\.plan: there is no plan at"):
        read_plan(tmp_path / "nothing")
    fewer = raced(simulated, tmp_path, "fewer", plan=str(race.run_directory), candidates=NAMES[:3])
    with pytest.raises(ConfigError, match=r"auto\.plan is for the candidates likelihood, lik"):
        train_run(fewer)


def test_a_race_on_few_rewarded_rows_is_near_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled terms and rewarded rows in memory: over .9 of the best value."""
    Machine(monkeypatch, step=0.04)
    world = BilinearWorld(200, 1.0, seed=3)
    settings = {
        "budget": 2.0,
        "candidates": ["likelihood_linear", "likelihood", "regression_linear"],
    }
    learner = TwoTowerPolicyLearner(5, 5, hidden_layer_sizes=(16,), embedding_dim=8, auto=settings)
    learner.fit(world.sample(4000, seed=1))
    report = learner.auto_.report
    assert report["plan"]["bounded"]
    context = world.contexts(1000, seed=99)
    pi = learner.predict_proba(context, world.action_context)[:, :, 0]
    expected = world.expected(context)
    assert (pi * expected).sum(1).mean() > 0.9 * expected.max(1).mean()
