"""training.precision=bfloat16: what is rounded, what is not, and how far gradients move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offtower.config import Config, config_fingerprint
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.errors import ConfigError
from offtower.models import policy as policies
from offtower.prepare import open_data
from offtower.progress import Progress
from offtower.training.setup import TrainingSetup, build_setup
from offtower.training.step import StepKey
from offtower.training.workers import SINGLE_PROCESS
from tests.training.conftest import make_config
from tests.training.distributed.test_gradients import first_batch
from tests.training.test_device import KINDS

LOW = "training.precision=bfloat16"


def config_of(simulated: Path, tmp_path: Path, *overrides: str) -> Config:
    short = ("training.epochs=1", "reward_model.epochs=1", "sampling.num_samples=8")
    return make_config(simulated, tmp_path, "a", *short, *overrides)


def setup_of(config: Config) -> TrainingSetup:
    data = open_data(config, Progress())
    model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
    return build_setup(config, data, model, SINGLE_PROCESS, Progress())


def gradient(config: Config) -> tuple[float, Tensor]:
    """Loss of the first batch, and all its gradients in one vector."""
    setup = setup_of(config)
    setup.policy.train()
    setup.policy.seed_draws(11)
    setup.trainer()
    if setup.step.proposal is not None:
        setup.step.proposal.at_step(0)
    value, _ = setup.step.loss(first_batch(setup), key=StepKey(1, 5))
    value.loss.backward()
    parts = [p.grad.to_dense() for p in setup.policy.parameters() if p.grad is not None]
    assert all(part.dtype == torch.float32 for part in parts)
    return float(value.loss.detach()), torch.cat([part.reshape(-1) for part in parts])


@pytest.mark.parametrize(
    "kind", ["regression", "exact ips", "dr, factored", "dr, dense", "mixed", "top_k"]
)
def test_gradients_are_those_of_float32_but_for_rounding(
    simulated: Path, tmp_path: Path, kind: str
) -> None:
    """bfloat16 has 8 bits: products and embeddings are off by up to 2^-9 of themselves, and a
    gradient of a few layers by a few times that."""
    config = config_of(simulated, tmp_path, *KINDS[kind])
    loss, wanted = gradient(config)
    low, found = gradient(config_of(simulated, tmp_path, *KINDS[kind], LOW))
    assert low == pytest.approx(loss, rel=0.02, abs=0.005)
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-5 < error < 0.05


def test_chunks_of_the_catalogue_are_embedded_again_as_before(
    simulated: Path, tmp_path: Path
) -> None:
    """The backward pass is of the function that the forward pass computed."""
    settings = ("objective.name=ips", "policy.item_tower.unknown_rate=0", LOW)
    _, whole = gradient(config_of(simulated, tmp_path, *settings, "training.item_chunk=1000"))
    _, parts = gradient(config_of(simulated, tmp_path, *settings, "training.item_chunk=5"))
    # The gradient of a weight is rounded once a chunk.
    assert float((parts - whole).norm() / whole.norm()) < 0.01


def test_operators_get_bfloat16_in_training_only(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, set[torch.dtype]]] = []
    real = policies.policy_terms

    def watched(u: Tensor, v: Tensor, action: Tensor, **more: Any) -> Any:
        q = more["reward_model"]
        parts = [] if q is None else [q.context, q.item]
        seen.append((torch.is_grad_enabled(), {x.dtype for x in (u, v, *parts)}))
        return real(u, v, action, **more)

    monkeypatch.setattr(policies, "policy_terms", watched)
    setup = setup_of(config_of(simulated, tmp_path, LOW))
    trainer = setup.trainer()
    trainer.fit()
    assert {(True, torch.bfloat16), (False, torch.float32)} == {
        (training, dtype) for training, dtypes in seen for dtype in dtypes
    }
    assert all(p.dtype == torch.float32 for p in setup.policy.parameters())
    for state in trainer._optimizer.state_dict()["state"].values():
        assert all(x.dtype == torch.float32 for x in state.values() if isinstance(x, Tensor))


def test_shards_and_fingerprints(simulated: Path, tmp_path: Path) -> None:
    config = config_of(simulated, tmp_path, LOW, "training.strategy=item_sharded")
    with pytest.raises(ConfigError, match=r"training\.precision=float32"):
        setup_of(config)
    low, full = (config_of(simulated, tmp_path, p) for p in (LOW, "training.precision=float32"))
    assert config_fingerprint(low) != config_fingerprint(full)
