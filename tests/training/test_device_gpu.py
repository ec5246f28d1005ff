"""Training on a real GPU against the CPU (`make test-gpu`); test_device.py needs no GPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from offtower.config import Config
from offtower.models.store import load_policy
from offtower.training.run import train_run
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.distributed.world import write_world
from tests.training.test_device import CPU, KINDS, SHARDED, Stop, stop_in, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def full_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def config_of(world: Path, *overrides: str) -> Config:
    short = ("training.epochs=1", "sampling.num_samples=8", "reward_model.epochs=1")
    return make_config(world, world / "runs", "a", *short, *overrides)


@pytest.mark.parametrize("kind", [*KINDS, "sharded"])
@pytest.mark.parametrize("most_bytes", [0, 1 << 40])
def test_losses_equal_those_of_the_cpu(world: Path, kind: str, most_bytes: int) -> None:
    """Rows, initial weights and draws are the same. Rounding differs, and so may the items that a
    top-k proposal counts among near ties."""
    config = config_of(world, *(SHARDED if kind == "sharded" else KINDS[kind]))
    wanted, _ = train(config, CPU)
    found, setup = train(config, GPU, most_bytes)
    assert all(parameter.is_cuda for parameter in setup.policy.parameters())
    a, b = found.history[-1], wanted.history[-1]
    assert a["loss"] == pytest.approx(b["loss"], rel=2e-3, abs=2e-4)
    assert a["validation"]["value"] == pytest.approx(b["validation"]["value"], rel=2e-3)


def test_resume_on_another_device(world: Path, tmp_path: Path) -> None:
    def run(name: str, *parts: tuple[str, int | None]) -> dict[str, torch.Tensor]:
        config = make_config(world, tmp_path, name, "training.epochs=4", EVERY_STEP)
        for number, (device, epoch) in enumerate(parts):
            config.training.device = device
            with nullcontext() if epoch is None else pytest.raises(Stop):
                train_run(config, resume=number > 0, hook=stop_in(epoch))
        return load_policy(config.run_directory / "policy")[0].state_dict()

    whole = run("whole", ("cpu", None))
    moved = run("moved", ("cpu", 1), ("cuda", 2), ("cpu", None))
    for name, value in whole.items():
        torch.testing.assert_close(moved[name], value, atol=5e-3, rtol=5e-2)
