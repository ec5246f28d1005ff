"""Training on Ray Train gives the policy of plain workers, also after lost and stalled workers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from offtower.cli import app
from offtower.config import Config, to_yaml
from offtower.errors import ClusterError, DataError
from offtower.execution import Execution
from offtower.jobs.train import WorkerPlan, train_on_ray
from offtower.metrics import read_metrics
from tests.jobs.conftest import Recorded
from tests.training.conftest import EVERY_STEP
from tests.training.distributed.processes import run_workers
from tests.training.distributed.test_runs import config_of, train
from tests.training.test_resume import assert_same_policy

pytestmark = pytest.mark.ray

PLAN = WorkerPlan(2, timeout=60.0)


@pytest.fixture(scope="module")
def plain(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two workers without Ray."""
    config = config_of(simulated, tmp_path_factory.mktemp("plain"), "a", "item_sharded")
    run_workers(2, train, config)
    return config.run_directory


def training_workers() -> list[psutil.Process]:
    """Processes of Ray Train's workers, by what Ray calls them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if command.startswith("ray::") and "TrainWorker" in command:
            found.append(process)
    return found


class Meanwhile(threading.Thread):
    """Does something to the workers whenever the run has reached some steps."""

    def __init__(self, run: Path, steps: list[int], act: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._run, self._steps, self._act = run, list(steps), act
        self.done = 0

    def run(self) -> None:
        deadline = time.monotonic() + 500
        while self._steps and time.monotonic() < deadline:
            newest = max(
                (int(p.name[5:]) for p in (self._run / "checkpoints").glob("step_*")), default=0
            )
            if newest >= self._steps[0]:
                self._steps.pop(0)
                self._act()
                self.done += 1
            time.sleep(0.02)


def kill_one() -> None:
    os.kill(training_workers()[-1].pid, signal.SIGKILL)


def stop_one() -> None:
    os.kill(training_workers()[0].pid, signal.SIGSTOP)


@pytest.mark.timeout(600)
def test_two_kills_and_a_stall_change_nothing(
    ray_cluster: str,
    simulated: Path,
    tmp_path: Path,
    plain: Path,
) -> None:
    """Two SIGKILLs of workers, then one that stops answering: the same bits as never interrupted,
    no metrics line is lost or doubled, and each restart is reported with its cause."""
    config = config_of(simulated, tmp_path, "a", "item_sharded", EVERY_STEP)
    actions = iter([kill_one, kill_one, stop_one])
    meanwhile = Meanwhile(config.run_directory, [5, 14, 24], lambda: next(actions)())
    meanwhile.start()
    shown = Recorded()
    plan = WorkerPlan(2, timeout=8.0, max_failures=4)
    manifest = train_on_ray(config, plan, execution=Execution(progress=shown))
    assert meanwhile.done == 3
    restarts = [line for line in shown.lines if line.startswith("workers failed and start again")]
    assert len(restarts) >= 3 and all("worker " in line for line in restarts)
    used = [line for line in shown.lines if line.startswith("continuing from the checkpoint")]
    assert len(used) >= 3
    assert any("rows/s, 2 workers" in line for line in shown.lines)
    assert manifest["workers"] == 2
    assert_same_policy(config.run_directory, plain)
    steps, wanted = (
        [(m["kind"], m["step"]) for m in read_metrics(path / "metrics.jsonl")]
        for path in (config.run_directory, plain)
    )
    assert steps == wanted


@pytest.mark.timeout(600)
def test_sampled_terms_over_divided_items(
    ray_cluster: str, simulated: Path, tmp_path: Path
) -> None:
    """A worker is killed while catalogue embeddings for a top-k proposal are pending: the same bits
    as of plain workers that nobody killed."""
    more = ("training.terms=sampled", "sampling.proposal=top_k", "sampling.top_k=3")
    more += ("sampling.num_samples=5", "sampling.refresh_steps=3")
    whole = config_of(simulated, tmp_path / "whole", "a", "item_sharded", *more)
    run_workers(2, train, whole)
    config = config_of(simulated, tmp_path / "killed", "a", "item_sharded", *more, EVERY_STEP)
    meanwhile = Meanwhile(config.run_directory, [10], kill_one)
    meanwhile.start()
    train_on_ray(config, PLAN)
    assert meanwhile.done == 1
    assert_same_policy(config.run_directory, whole.run_directory)


def test_the_command_line(ray_cluster: str, simulated: Path, tmp_path: Path, plain: Path) -> None:
    config = config_of(simulated, tmp_path, "a", "item_sharded", "tracking.tensorboard=true")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    result = CliRunner().invoke(app, ["train", str(path), "--workers", "2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["workers"] == 2 and found["steps"] == 44
    assert_same_policy(config.run_directory, plain)
    assert list((config.run_directory / "tensorboard").glob("events.*"))


def test_errors_are_those_of_one_process(
    ray_cluster: str,
    simulated: Path,
    tmp_path: Path,
) -> None:
    config = config_of(simulated, tmp_path, "bad", "replicated", "data.train=nowhere")
    with pytest.raises(DataError, match="nowhere"):
        train_on_ray(config, PLAN)


def test_more_workers_than_room_are_refused_at_once(
    ray_cluster: str,
    simulated: Path,
    tmp_path: Path,
) -> None:
    config = config_of(simulated, tmp_path, "many", "replicated")
    began = time.monotonic()
    with pytest.raises(ClusterError, match="no room for 9 workers"):
        train_on_ray(config, WorkerPlan(9))
    assert time.monotonic() - began < 20


def test_workers_that_are_lost_again_and_again(
    ray_cluster: str,
    simulated: Path,
    tmp_path: Path,
) -> None:
    config: Config = config_of(simulated, tmp_path, "a", "replicated")
    Meanwhile(config.run_directory, [3], kill_one).start()
    with pytest.raises(ClusterError, match=r"lost more than 0 times.*--resume goes on"):
        train_on_ray(config, WorkerPlan(2, max_failures=0, timeout=30.0))
