"""Sampled terms through the whole loop: right gradients, exact resumption, what moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offtower.config import Config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.errors import ConfigError, RunError
from offtower.metrics import read_metrics
from offtower.prepare import open_data
from offtower.progress import Progress
from offtower.sampling import Proposal
from offtower.sampling.draw_sources import UniformSource
from offtower.training.epoch_metrics import EpochSums, StepMetricsQueue
from offtower.training.run import build_trainer, train_run
from offtower.training.sampled import SampledTerms
from offtower.training.step import ReplicatedStep, StepKey
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.test_resume import assert_same_policy, fill_the_disk

SETTINGS: dict[str, dict[str, Any]] = {
    "mixed": {"proposal": "mixed", "num_samples": 5},
    "frequency": {"proposal": "frequency", "num_samples": 7},
    "in_batch": {"proposal": "in_batch"},
    "top_k": {"proposal": "top_k", "num_samples": 4, "top_k": 3, "refresh_steps": 7},
    "uniform, exact at times": {"proposal": "uniform", "num_samples": 4, "exact_every": 5},
}


def sampled_config(
    simulated: Path, runs: Path, sampling: dict[str, Any], *overrides: str, **sections: Any
) -> Config:
    return make_config(
        *(simulated, runs, "a", "training.terms=sampled", "training.epochs=2"),
        *overrides,
        sampling=sampling,
        **sections,
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("updates", ["auto", "rowwise_adagrad"])
def test_a_broken_run_resumes_to_the_same_bits(
    simulated: Path, tmp_path: Path, name: str, updates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step writes a checkpoint; one write fails inside the last epoch, with a catalogue
    embedding pending for top_k."""
    if updates != "auto" and name not in ("mixed", "top_k"):
        pytest.skip("one proposal with state and one without are enough")
    over = f"training.table_updates={updates}"
    whole = sampled_config(simulated, tmp_path / "whole", SETTINGS[name], over)
    train_run(whole)
    broken = sampled_config(simulated, tmp_path / "broken", SETTINGS[name], over, EVERY_STEP)
    fill_the_disk(monkeypatch, after=32)
    with pytest.raises(RunError, match="No space left"):
        train_run(broken)
    monkeypatch.undo()
    newest = sorted((broken.run_directory / "checkpoints").glob("step_*"))[-1]
    step = int(newest.name.removeprefix("step_"))
    lines = read_metrics(whole.run_directory / "metrics.jsonl")
    first, last = (line["step"] for line in lines if line["kind"] == "epoch")
    assert first < step < last
    train_run(broken, resume=True)
    assert_same_policy(broken.run_directory, whole.run_directory)


def test_the_expected_gradient_is_the_exact_one(simulated: Path, tmp_path: Path) -> None:
    """Draws of the whole catalogue, each item twice: the step's gradient is that of exact terms,
    towers, sparse tables and reward model included."""
    config = sampled_config(simulated, tmp_path, {"proposal": "uniform", "num_samples": 24})
    data = open_data(config, Progress())
    model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
    trainer = build_trainer(config, data, model)
    trainer.policy.eval()
    batch = _first_batch(trainer)
    found = []
    whole = Proposal([UniformSource(data.items.num_items, 24)])
    for sampled in (SampledTerms(trainer.policy, data.items, whole), None):
        before = trainer.step
        assert isinstance(before, ReplicatedStep)
        step = ReplicatedStep(before.trained, before.objective, model, sampled=sampled)
        trainer.policy.zero_grad(set_to_none=True)
        value, measures = step.loss(batch, diagnose=True, key=StepKey(1, 5))
        value.loss.backward()
        found.append(
            [
                float(value.value),
                measures.entropy if measures else None,
                *(
                    torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
                    for p in trainer.policy.parameters()
                ),
            ]
        )
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-4, atol=1e-6)


def _first_batch(trainer: Any) -> Any:
    with trainer.reader() as reader:
        for batch in reader.epoch(0):
            return batch
    raise AssertionError


@pytest.mark.parametrize("name", ["softmax", "in_batch_softmax", "mixed_negatives"])
def test_supervised_baselines_train(simulated: Path, tmp_path: Path, name: str) -> None:
    config = make_config(
        *(simulated, tmp_path, "a", f"objective.name={name}", "training.epochs=8"),
        *("training.learning_rate=0.02", "sampling.num_samples=6"),
    )
    train_run(config)
    lines = read_metrics(config.run_directory / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["kind"] == "epoch"]
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0] - 0.02
    assert not (config.run_directory / "reward_model").exists()


def test_steps_touch_the_drawn_items_only(simulated: Path, tmp_path: Path) -> None:
    """The item tower never sees the catalogue, and rows of tables that no step read stay."""
    config = sampled_config(
        *(simulated, tmp_path, {"proposal": "uniform", "num_samples": 2}),
        *("training.batch_size=4", "objective.name=weighted_likelihood"),
    )
    data = open_data(config, Progress())
    trainer = build_trainer(config, data, None)
    seen: list[int] = []
    trainer.policy.item_tower.register_forward_hook(
        lambda module, arguments, output: seen.append(len(output[0]))
    )
    batch = _first_batch(trainer)
    trainer.policy.train()
    for step in range(5):
        trainer.update(batch, StepMetricsQueue(EpochSums()), StepKey(step, step))
    assert seen and max(seen) <= 6 < data.items.num_items


def test_lazy_adamw_with_another_optimizer_is_refused(simulated: Path, tmp_path: Path) -> None:
    config = sampled_config(
        *(simulated, tmp_path, SETTINGS["mixed"]),
        *("training.optimizer=sgd", "training.table_updates=lazy_adamw"),
    )
    with pytest.raises(ConfigError, match="use rowwise_adagrad or dense"):
        train_run(config)
