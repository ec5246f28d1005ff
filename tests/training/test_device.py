"""Training on a GPU, on machines without one: a pretended device that refuses to mix, and counts
what the host waits for. What it computes is what a CPU computes, so runs must be equal to the bit.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offtower.config import Config
from offtower.crossfit.reward_model import obtain_reward_model
from offtower.data.encoding import FeatureEncoding, to_tensors
from offtower.errors import ConfigError, RunError
from offtower.metrics import read_metrics
from offtower.models.device_items import DeviceItemFeatures
from offtower.models.features import FeatureEncoder, FeatureTensors
from offtower.models.policy import TwoTowerPolicy
from offtower.models.store import load_policy
from offtower.prepare import PreparedData, open_data
from offtower.progress import Progress
from offtower.training import device as devices
from offtower.training import epoch_metrics, step, two_stage
from offtower.training.auto import train_auto
from offtower.training.distributed import sharded_terms
from offtower.training.run import train_run
from offtower.training.setup import TrainingSetup, build_setup
from offtower.training.trainer import EpochHook, TrainingResult
from offtower.training.workers import SINGLE_PROCESS
from tests.pretend_gpu import DEVICE, GPUTensor, PretendGPU
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.distributed.world import write_world
from tests.training.test_trainer import Exploding

CPU = torch.device("cpu")
ALL = 1 << 40
SAMPLED = ("training.terms=sampled", "objective.name=ips")
KINDS: dict[str, tuple[str, ...]] = {
    "regression": ("objective.name=regression", "training.weight_average=0.5"),
    "exact ips": ("objective.name=snips", "policy.learn_temperature=true"),
    "dr, factored": ("objective.name=dr", "policy.item_bias=true", "policy.item_tower.bag=root"),
    "dr, dense": (
        "objective.name=dr",
        "reward_model.kind=dense",
        "reward_model.estimator=sklearn.linear_model:Ridge",
    ),
    "potec": ("objective.name=potec", "objective.arguments.clusters=4"),
    "exact, lazy tables": ("objective.name=snips", "training.table_updates=lazy_adamw"),
    "uniform": (*SAMPLED, "sampling.proposal=uniform", "policy.item_bias=true"),
    "mixed": (*SAMPLED, "sampling.proposal=mixed", "objective.name=dr", "sampling.exact_every=3"),
    "in_batch": (*SAMPLED, "sampling.proposal=in_batch", "objective.name=in_batch_softmax"),
    "frequency": (
        *SAMPLED,
        "sampling.proposal=frequency",
        "training.table_updates=rowwise_adagrad",
    ),
    "top_k": (*SAMPLED, "sampling.proposal=top_k", "sampling.refresh_steps=3", "sampling.top_k=3"),
}
SHARDED = ("training.strategy=item_sharded",)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), rows=300)


@pytest.fixture(autouse=True)
def search_in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretence holds for one thread."""
    monkeypatch.setattr("offtower.sampling.top_k.ThreadPoolExecutor", _Here)


@pytest.fixture(autouse=True)
def bags_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they are summed in another order."""
    monkeypatch.setattr("offtower.models.features.uses_bag_sums", lambda table: False)


@pytest.fixture(autouse=True)
def generators(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The GPU's generator of random numbers, which the pretence lacks: what it was set to."""
    told: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: ("state of", device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *given: told.append(given))
    return told


class _Here:
    def __init__(self, **_: Any) -> None: ...

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, **_: Any) -> None: ...


def config_of(world: Path, *overrides: str, **sections: Any) -> Config:
    short = (
        *("training.epochs=1", "training.batch_size=64", "data.window_rows=200"),
        *("sampling.num_samples=8", "reward_model.epochs=1"),
    )
    return make_config(world, world / "runs", "a", *short, *overrides, **sections)


def train(
    config: Config, device: torch.device, most_bytes: int = ALL
) -> tuple[TrainingResult, TrainingSetup]:
    data = open_data(config, Progress()).to_device(device, most_bytes)
    model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
    setup = build_setup(config, data, model, SINGLE_PROCESS, Progress())
    return setup.trainer().fit(), setup


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.held if isinstance(value, GPUTensor) else value
        for name, value in module.state_dict().items()
    }


def assert_same_history(one: TrainingResult, other: TrainingResult) -> None:
    for a, b in zip(one.history, other.history, strict=True):
        assert {**a, "rows_per_second": 0, "waiting_share": 0} == {
            **b,
            "rows_per_second": 0,
            "waiting_share": 0,
        }


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_gpu_is_that_of_a_cpu(
    world: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The pretended GPU has no core of its own for partial results.
    plain_torch = functools.partial(two_stage.partial_terms, backend="reference")
    monkeypatch.setattr(two_stage, "partial_terms", plain_torch)
    config = config_of(world, *KINDS[kind])
    wanted, plain = train(config, CPU)
    with PretendGPU():
        found, setup = train(config, DEVICE)
    assert all(isinstance(p, GPUTensor) for p in setup.policy.parameters())
    assert_same_history(found, wanted)
    for name, value in weights(setup.policy).items():
        assert torch.equal(value, weights(plain.policy)[name]), name


@pytest.mark.parametrize("kind", ["dr, factored", "regression", "mixed", "top_k"])
def test_a_shard_of_items_on_a_gpu(world: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The pretended GPU has no core of its own for partial results.
    plain_torch = functools.partial(sharded_terms.partial_terms, backend="reference")
    monkeypatch.setattr(sharded_terms, "partial_terms", plain_torch)
    config = config_of(world, *KINDS[kind], *SHARDED)
    wanted, plain = train(config, CPU)
    with PretendGPU():
        found, setup = train(config, DEVICE)
        whole = setup.whole_policy()
    assert_same_history(found, wanted)
    reference = plain.whole_policy()
    assert whole is not None and reference is not None
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(reference)[name]), name


def test_features_that_a_gpu_does_not_keep_are_sent(world: Path) -> None:
    config = config_of(world, *KINDS["mixed"])
    with PretendGPU():
        kept, first = train(config, DEVICE)
        sent, second = train(config, DEVICE, 0)
    assert isinstance(first.data.items, DeviceItemFeatures) and first.data.items.resident
    assert isinstance(second.data.items, DeviceItemFeatures) and not second.data.items.resident
    assert_same_history(kept, sent)
    for name, value in weights(first.policy).items():
        assert torch.equal(value, weights(second.policy)[name]), name


@pytest.mark.parametrize(
    ("kind", "waits_for"),
    [
        ("regression", set()),
        ("dr, factored", set()),
        # Coalescing a sparse gradient reads the number of its distinct rows.
        ("mixed", {"aten._coalesce.default"}),
    ],
)
def test_a_step_does_not_wait(world: Path, kind: str, waits_for: set[str]) -> None:
    """Twice as many steps wait as often, but for what is named."""

    def waits(batch: int) -> Counter[str]:
        config = config_of(
            world, *KINDS[kind], f"training.batch_size={batch}", "training.log_every_steps=1000"
        )
        with PretendGPU() as gpu:
            data = open_data(config, Progress()).to_device(DEVICE, ALL)
            model = obtain_reward_model(config.reward_model, data, config.seed, Progress())
            trainer = build_setup(config, data, model, SINGLE_PROCESS, Progress()).trainer()
            gpu.waits.clear()
            assert trainer.fit().steps < epoch_metrics._MAX_PENDING
            return gpu.waits

    few, many = waits(100), waits(50)
    assert few, "the end of an epoch is waited for"
    assert {name for name in many if many[name] != few[name]} == waits_for


def test_what_forgets_the_device_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: a tensor that is left on the CPU ends the step."""
    monkeypatch.setattr(step, "to_tensors", lambda arrays, device: to_tensors(arrays))
    config = config_of(world, *KINDS["exact ips"])
    with PretendGPU(), pytest.raises(RuntimeError, match="on the same device"):
        train(config, DEVICE)


class OwnTower(nn.Module):
    """A user's module that draws from torch's generator."""

    def __init__(self, encoding: FeatureEncoding, output_dim: int) -> None:
        super().__init__()
        self.encoder = FeatureEncoder(encoding, 4)
        self.layer = nn.Linear(self.encoder.width, output_dim)

    def forward(self, features: FeatureTensors) -> Tensor:
        output: Tensor = self.layer(nn.functional.dropout(self.encoder(features), 0.2))
        return output


def test_a_users_module_repeats_its_draws(world: Path, generators: list[Any]) -> None:
    """Chunks of the catalogue are embedded twice in a step, with the same draws of the GPU."""
    tower = {"item_tower": {"module": f"{__name__}:OwnTower"}, "embedding_dim": 4}
    config = config_of(world, "objective.name=ips", policy=tower)
    wanted, _ = train(config, CPU)
    with PretendGPU():
        found, _ = train(config, DEVICE)
    assert_same_history(found, wanted)
    assert generators and all(given == (("state of", DEVICE), DEVICE) for given in generators)


@pytest.mark.slow
def test_auto_on_a_gpu(world: Path) -> None:
    settings = ("objective.name=auto", "auto.epochs=1", "auto.folds=2", "auto.batch_size=64")
    config = config_of(world, *settings)

    def learn(device: torch.device) -> Any:
        data: PreparedData = open_data(config, Progress()).to_device(device, ALL)
        return train_auto(config, data)

    wanted = learn(CPU)
    with PretendGPU():
        found = learn(DEVICE)
    assert found.report == wanted.report
    assert not any(isinstance(p, GPUTensor) for p in found.policy.parameters())


@pytest.fixture
def gpu_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """training.device=cuda is the pretended one."""
    resolve = devices.resolve_device
    monkeypatch.setattr(
        devices, "resolve_device", lambda name: DEVICE if name == "cuda" else resolve(name)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (ALL, ALL))


class Stop(Exception):
    """What kills a run."""


def stop_in(epoch: int | None) -> Callable[[PreparedData], EpochHook]:
    """At that epoch's end, before its checkpoint."""

    def hook(policy: TwoTowerPolicy, now: int) -> dict[str, float]:
        assert not any(isinstance(p, GPUTensor) for p in policy.parameters())
        if now == epoch:
            raise Stop
        return {}

    return lambda data: hook


@pytest.mark.usefixtures("gpu_for_runs")
def test_a_run_goes_on_where_another_device_left_it(world: Path, tmp_path: Path) -> None:
    """cpu -> cuda -> cpu, in the middle of epochs, is the run of one device."""
    more = (
        *("training.epochs=3", "training.weight_average=0.6", "training.terms=sampled"),
        *("training.batch_size=75", "data.window_rows=300", "reward_model.epochs=1"),
        *("sampling.num_samples=8", EVERY_STEP),
    )
    runs = [make_config(world, tmp_path, name, *more) for name in ("whole", "moved")]
    train_run(runs[0])
    for device, epoch in (("cpu", 0), ("cuda", 1), ("cpu", None)):
        runs[1].training.device = device
        with PretendGPU(), nullcontext() if epoch is None else pytest.raises(Stop):
            train_run(runs[1], resume=epoch != 0, hook=stop_in(epoch))
    one, other = (load_policy(run.run_directory / "policy")[0].state_dict() for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("gpu_for_runs")
def test_a_loss_that_is_not_finite_names_its_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though steps are read together, and no checkpoint has what came after."""
    few = ("training.device=cuda", "training.batch_size=75", "data.window_rows=300")
    objective = {"name": f"{Exploding.__module__}:Exploding", "arguments": {"after": 5}}
    config = make_config(world, tmp_path, "a", *few, objective=objective)
    config.training.log_every_steps = 1000
    config.reward_model.kind = "none"
    with PretendGPU(), pytest.raises(RunError, match=r"step 6 \(epoch 2\) gave a loss of nan"):
        train_run(config)
    names = [path.name for path in (config.run_directory / "checkpoints").glob("step_*")]
    assert names == ["step_000000000004"]
    # Read every step's numbers, and the step itself ends the run.
    monkeypatch.setattr(epoch_metrics, "_MAX_PENDING", 1)
    again = make_config(world, tmp_path, "b", *few, objective=objective)
    with PretendGPU(), pytest.raises(RunError, match=r"step 6 \(epoch 2\)"):
        train_run(again)
    steps = [line["step"] for line in read_metrics(again.run_directory / "metrics.jsonl")]
    assert max(steps) <= 5


def test_devices_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.resolve_device("cpu") == CPU
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    assert devices.resolve_device("auto") == CPU
    with pytest.raises(ConfigError, match=r"training\.device=cuda, but .*training\.device=cpu"):
        devices.resolve_device("cuda")
    assert "auto selects the cpu: " in devices.auto_device_status()
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "current_device", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(devices, "available_backends", lambda: ("reference", "cpu"))
    monkeypatch.setattr(devices, "backend_status", lambda: {"cuda": "not built (no nvcc)"})
    # Without the fused operators a GPU has to be asked for.
    assert devices.resolve_device("auto") == CPU
    assert "not built (no nvcc)" in devices.auto_device_status()
    assert "cuda:1 (NVIDIA H200), plain-torch operators" in devices.auto_device_status()
    assert devices.resolve_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(devices, "available_backends", lambda: ("reference", "cpu", "cuda"))
    assert devices.resolve_device("auto") == torch.device("cuda", 1)
    assert devices.auto_device_status() == "auto selects cuda:1 (NVIDIA H200), fused operators"
    assert devices.resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"cuda:2, but torch sees cuda:0 to cuda:1 only"):
        devices.resolve_device("cuda:2")


@pytest.mark.parametrize("wrong", ["gpu", "cuda:", "cuda:x", "CUDA", ""])
def test_unknown_devices_are_refused(world: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.device"):
        config_of(world, f"training.device='{wrong}'")
