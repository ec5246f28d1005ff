"""The course of the temperature: its closed form, what steps take of it, and what others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offtower.config import Config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.errors import ConfigError, RunError
from offtower.metrics import read_metrics
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy
from offtower.prepare import open_data
from offtower.progress import Progress
from offtower.training.run import train_run
from offtower.training.schedule import temperature
from offtower.training.setup import build_setup
from offtower.training.step import ReplicatedStep, StepKey
from offtower.training.workers import SINGLE_PROCESS
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.test_resume import assert_same_policy, fill_the_disk

COURSE = ("policy.temperature=0.5", "training.initial_temperature=4.0")


def test_values_at_the_start_the_middle_and_the_end() -> None:
    assert temperature(0.0, 4.0, 0.25, 0.8) == 4.0
    assert temperature(0.4, 4.0, 0.25, 0.8) == pytest.approx(1.0, rel=1e-15)
    assert temperature(0.6, 4.0, 0.25, 0.8) == pytest.approx(0.5, rel=1e-15)
    assert temperature(0.8, 4.0, 0.25, 0.8) == 0.25
    assert temperature(0.99, 4.0, 0.25, 0.8) == 0.25
    # From cold to hot, over all of training.
    assert temperature(0.5, 0.25, 4.0, 1.0) == pytest.approx(1.0, rel=1e-15)


def test_only_training_steps_use_the_schedule(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 rows in batches of 150, two epochs: the k-th of eight steps begins at k / 8."""
    taken: list[float] = []
    measured: list[float] = []
    loss, measures = ReplicatedStep.loss, ReplicatedStep.diagnostics

    def step(self: ReplicatedStep, *arguments: Any, **more: Any) -> Any:
        taken.append(self.policy.temperature)
        return loss(self, *arguments, **more)

    def at_the_end(self: ReplicatedStep, *arguments: Any, **more: Any) -> Any:
        measured.append(self.policy.temperature)
        return measures(self, *arguments, **more)

    monkeypatch.setattr(ReplicatedStep, "loss", step)
    monkeypatch.setattr(ReplicatedStep, "diagnostics", at_the_end)
    seen: list[float] = []

    def hook(policy: TwoTowerPolicy, epoch: int) -> dict[str, float]:
        seen.append(policy.temperature)
        return {}

    config = make_config(
        *(simulated, tmp_path, "a", "objective.name=ips", *COURSE),
        *("training.annealing_share=0.75", "training.epochs=2", "training.batch_size=150"),
        *("data.window_rows=1000",),
    )
    train_run(config, hook=lambda data: hook)
    wanted = [4.0 * (1 / 8) ** min(k / 6, 1.0) for k in range(8)]
    assert taken == pytest.approx(wanted, rel=1e-12)
    assert seen == measured == [0.5, 0.5]
    policy, _ = load_policy(config.run_directory / "policy")
    assert policy.temperature == 0.5 and policy.train().temperature == 0.5


def test_validation_uses_the_served_temperature(simulated: Path, tmp_path: Path) -> None:
    """Weights that hardly move: scores are those of a run without a course, though its values in
    training are others."""
    found = []
    for number, course in enumerate((COURSE, COURSE[:1])):
        config = make_config(
            *(simulated, tmp_path, f"run-{number}", "objective.name=ips", *course),
            *("training.optimizer=sgd", "training.learning_rate=1e-12", "training.epochs=2"),
            "training.weight_decay=0.0",
        )
        train_run(config)
        found.append(
            [
                x
                for x in read_metrics(config.run_directory / "metrics.jsonl")
                if x["kind"] == "epoch"
            ]
        )
    for one, two in zip(*found, strict=True):
        assert one["validation"]["value"] == pytest.approx(two["validation"]["value"], rel=1e-6)
    assert abs(found[0][0]["value_estimate"] - found[1][0]["value_estimate"]) > 1e-3


STEPS: dict[str, tuple[str, ...]] = {
    "exact": (),
    "item_sharded": ("training.strategy=item_sharded",),
    **{
        f"{strategy} {proposal}": (
            *(f"training.strategy={strategy}", "training.terms=sampled"),
            *(f"sampling.proposal={proposal}", "sampling.num_samples=5", "sampling.top_k=3"),
        )
        for strategy in ("replicated", "item_sharded")
        for proposal in ("mixed", "top_k")
    },
}


def config_of(simulated: Path, runs: Path, *overrides: str) -> Config:
    return make_config(
        *(simulated, runs, "a", "reward_model.epochs=1", "policy.item_bias=true", *overrides)
    )


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_a_fixed_temperature(simulated: Path, tmp_path: Path, name: str) -> None:
    found = []
    now = 4.0 * (0.5 / 4.0) ** 0.6
    for fixed in (True, False):
        course = (f"policy.temperature={now!r}",) if fixed else COURSE
        config = config_of(simulated, tmp_path, *STEPS[name], *course)
        data = open_data(config, Progress())
        model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
        setup = build_setup(config, data, model, SINGLE_PROCESS, Progress())
        trainer = setup.trainer()
        with trainer.reader() as reader:
            batch = next(iter(reader.epoch(0)))
        setup.policy.train()
        setup.policy.seed_draws(3)
        trainer._temperature.at(0.3)
        if setup.step.proposal is not None:
            setup.step.proposal.at_step(0)
        value, measures = setup.step.loss(batch, diagnose=True, key=StepKey(1, 5))
        value.loss.backward()
        assert measures is not None
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            for p in setup.policy.parameters()
        ]
        assert max(float(g.abs().max()) for g in gradients) > 1e-4
        found.append([value.value, torch.tensor(measures.entropy), *gradients])
        if setup.step.proposal is not None:
            setup.step.proposal.close()
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["exact", "replicated top_k"])
def test_a_broken_run_resumes_to_the_same_bits(
    simulated: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write after the 20th step fails, while the temperature is on its way."""
    more = (*COURSE, *STEPS[name], "training.epochs=3", "sampling.refresh_steps=7")
    whole = config_of(simulated, tmp_path / "whole", *more)
    train_run(whole)
    other = config_of(simulated, tmp_path / "other", *more, "training.annealing_share=0.51")
    train_run(other)
    with pytest.raises(AssertionError):
        assert_same_policy(other.run_directory, whole.run_directory)
    broken = config_of(simulated, tmp_path / "broken", *more, EVERY_STEP)
    fill_the_disk(monkeypatch, after=24)
    with pytest.raises(RunError, match="No space left"):
        train_run(broken)
    monkeypatch.undo()
    newest = sorted((broken.run_directory / "checkpoints").glob("step_*"))[-1]
    step = int(newest.name.removeprefix("step_"))
    assert 0 < step < 0.5 * 57 and step % 19 != 0
    train_run(broken, resume=True)
    assert_same_policy(broken.run_directory, whole.run_directory)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy.learn_temperature=true"], "that policy.learn_temperature would learn"),
        (["objective.name=regression"], "fits scores without a temperature"),
        (["training.initial_temperature=0"], "greater than 0"),
        (["training.annealing_share=0"], "greater than 0"),
        (["training.annealing_share=1.5"], "less than or equal to 1"),
    ],
)
def test_refusals(simulated: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_run(make_config(simulated, tmp_path, "a", *COURSE, *overrides))
    assert not (tmp_path / "a" / "reward_model").exists()
