"""Requests of GPU training jobs, checked without a cluster and without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from offtower.errors import ClusterError, ConfigError
from offtower.jobs import train as jobs
from offtower.jobs.mapper import RayMapper
from offtower.jobs.resources import Node
from offtower.jobs.train import WorkerPlan, train_on_ray
from tests.training.conftest import make_config

CPU_NODE = Node("head", 8.0, 0.0, 2.0**34)
GPU_NODE = Node("gpus", 16.0, 2.0, 2.0**36)


@pytest.mark.parametrize(
    ("device", "gpus", "wanted"),
    [
        ("auto", None, 0),
        ("auto", 0, 0),
        ("auto", 1, 1),
        ("cuda", None, 1),
        ("cuda", 1, 1),
        ("cpu", None, 0),
        ("cpu", 0, 0),
    ],
)
def test_a_worker_has_a_gpu_if_it_trains_on_one(device: str, gpus: int | None, wanted: int) -> None:
    assert WorkerPlan(gpus=gpus).gpus_for(device) == wanted


@pytest.mark.parametrize(
    ("device", "gpus", "said"),
    [
        ("auto", 2, "take more workers with 1 each"),
        ("cuda:1", None, "training.device=cuda$"),
        ("cuda:1", 1, "training.device=cuda$"),
        ("cpu", 1, "do not fit"),
        ("cuda", 0, "do not fit"),
    ],
)
def test_contradicting_settings_are_refused(device: str, gpus: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        WorkerPlan(gpus=gpus).gpus_for(device)


class FakeRay:
    """Replaces Ray Train and records its arguments."""

    def __init__(self, nodes: tuple[Node, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: dict[str, Any] = {}
        ray, train, torch = (ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch"))
        ray.train = train  # type: ignore[attr-defined]
        for name in ("ScalingConfig", "RunConfig", "FailureConfig"):
            setattr(train, name, lambda **given: given)
        train.UserCallback = object  # type: ignore[attr-defined]
        torch.TorchConfig = lambda **given: given  # type: ignore[attr-defined]
        torch.TorchTrainer = self._trainer  # type: ignore[attr-defined]
        for module in (ray, train, torch):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr("offtower.jobs.resources.nodes", lambda: nodes)

    def _trainer(self, work: Any, **asked: Any) -> Any:
        self.asked = asked
        return SimpleNamespace(fit=lambda: None)


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 1), ("auto", 0)])
def test_the_resources_that_ray_gets(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, gpus: int
) -> None:
    ray = FakeRay((CPU_NODE, GPU_NODE), monkeypatch)
    config = make_config(simulated, tmp_path, "a", f"training.device={device}")
    train_on_ray(config, WorkerPlan(2, cpus=3.0))
    each = {"CPU": 3.0, "GPU": 1} if gpus else {"CPU": 3.0}
    assert ray.asked["scaling_config"]["resources_per_worker"] == each
    assert ray.asked["scaling_config"]["use_gpu"] is bool(gpus)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    assert ray.asked["torch_config"]["backend"] == backend
    # A worker uses the device that it requested, whatever else its node has.
    sent = ray.asked["train_loop_config"]["config"]["training"]["device"]
    assert sent == ("cuda" if gpus else "cpu")
    assert jobs.RunDirectory(config.run_directory).load_config().training.device == device


def test_too_few_gpus_are_refused_with_the_numbers(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRay((CPU_NODE, GPU_NODE), monkeypatch)
    config = make_config(simulated, tmp_path, "a", "training.device=cuda")
    with pytest.raises(ClusterError) as refused:
        train_on_ray(config, WorkerPlan(3))
    said = str(refused.value)
    assert "no room for 3 workers of 1 CPU and 1 GPU" in said
    assert "asked  3 CPUs, 3 GPUs" in said and "there  24 CPUs, 2 GPUs" in said
    assert "gpus: 16 CPUs, 2 GPUs, 64.0 GiB, room for 2" in said
    assert not config.run_directory.exists()


class RayError(Exception):
    pass


class OutOfMemoryError(RayError):
    pass


class NodeDiedError(RayError):
    pass


class Tasks:
    """Replaces Ray: runs tasks in this process, and loses the worker of part 1."""

    def __init__(self, lost: Exception) -> None:
        self.lost, self.asked = lost, dict[str, Any]()
        self.exceptions = SimpleNamespace(
            RayError=RayError,
            RayTaskError=KeyError,
            WorkerCrashedError=OutOfMemoryError,
            OutOfMemoryError=OutOfMemoryError,
        )

    def remote(self, _: Any) -> Tasks:
        return self

    def options(self, **asked: Any) -> Any:
        self.asked = asked
        return SimpleNamespace(remote=lambda function, part, _: (function, part))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, tasks: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return tasks[:1], tasks[1:]

    def get(self, task: Any) -> Any:
        function, part = task
        if part == 1:
            raise self.lost
        return function(part)

    def cancel(self, _: Any) -> None:
        pass


def test_tasks_ask_for_gpus_and_a_part_without_memory_can_fail_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mapped(lost: Exception, **more: Any) -> list[str]:
        monkeypatch.setattr("offtower.jobs.mapper.import_ray", lambda: tasks)
        tasks = Tasks(lost)
        found = list(RayMapper(2, gpus=1.0).map(str, [0, 1, 2], "training", **more))
        assert tasks.asked["num_gpus"] == 1.0
        return found

    low = OutOfMemoryError("killed due to the node running low on memory. 31GB\nadvice")
    found = mapped(low, on_lost=lambda part, error: f"{part}: {error}")
    assert [found[0], found[2]] == ["0", "2"]
    assert found[1].startswith("1: training: the worker of part 1 was lost repeatedly")
    assert "out of memory: killed due to" in found[1] and "advice" not in found[1]
    with pytest.raises(ClusterError, match="part 1 was lost"):
        mapped(low)
    # The cluster may be gone: the parts did nothing wrong.
    with pytest.raises(ClusterError, match="part 1 was lost"):
        mapped(NodeDiedError("gone"), on_lost=lambda part, error: "")
