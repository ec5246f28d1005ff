"""Killed tasks and trials, fewer nodes than asked for, and a cluster that is lost as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from offtower.config import to_yaml
from offtower.data.log import ParquetLog
from offtower.execution import Execution
from offtower.jobs import mapper as jobs
from offtower.jobs.train import WorkerPlan, train_on_ray
from offtower.training import tune as tuning
from offtower.training.run import train_run
from tests.jobs.conftest import RAY_ENVIRONMENT
from tests.jobs.test_verbs import ON_RAY, run, text
from tests.mappers import content
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.distributed.processes import run_workers
from tests.training.distributed.test_runs import assert_near, config_of, train
from tests.training.distributed.world import write_world
from tests.training.test_resume import assert_same_policy

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class DiesOnce:
    """The function of a pass, whose worker is killed once: after its work, before its result."""

    function: Callable[[Any], Any]
    folder: Path

    def __call__(self, part: Any) -> Any:
        result = self.function(part)
        with contextlib.suppress(FileExistsError):
            (self.folder / "killed").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
        return result


class MortalMapper(jobs.RayMapper):
    """A mapper whose tasks are killed in one of its passes."""

    folder = Path()
    task = ""

    def map(
        self, function: Any, parts: Sequence[Any], task: str = "", **more: Any
    ) -> Iterator[Any]:
        if task == self.task:
            function = DiesOnce(function, self.folder)
        return super().map(function, parts, task, **more)


@pytest.mark.parametrize("task", ["drawing train", "writing rows", "validating"])
def test_verbs_with_killed_tasks_give_the_bytes_of_one_process(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    monkeypatch.setattr(MortalMapper, "folder", killed)
    monkeypatch.setattr(MortalMapper, "task", task)
    monkeypatch.setattr(jobs, "RayMapper", MortalMapper)
    simulate = ("simulate", "--items", "30", "--rows", "2000", "--out")
    text((*simulate, tmp_path / "one"), 0)
    log = tmp_path / "one" / "train"
    if task == "drawing train":
        text((*simulate, tmp_path / "two", *ON_RAY), 0)
        assert content(tmp_path / "two") == content(tmp_path / "one")
    elif task == "validating":
        # Ray's message of the killed worker goes to standard error.
        one, two = (run("validate", log, "--json", *more) for more in ((), ON_RAY))
        assert (two.exit_code, two.stdout) == (0, one.stdout)
    else:
        source, schema = tmp_path / "source.parquet", tmp_path / "schema.yaml"
        opened = ParquetLog.open(log)
        pq.write_table(next(iter(opened.tables())), source, row_group_size=400)
        schema.write_text(json.dumps({"log": opened.schema.to_dict()}))
        ingest = ("ingest", source, "--schema", schema, "--split", "time", "--out")
        for name, more in (("a", ()), ("b", ON_RAY)):
            text((*ingest, tmp_path / name, *more), 0)
        assert content(tmp_path / "b") == content(tmp_path / "a")
    assert list(killed.iterdir())


@pytest.mark.slow
def test_a_killed_trial_continues_and_the_same_one_is_chosen(
    ray_cluster: str, simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {
        "training.learning_rate": [0.003, 0.01, 0.03],
        "training.epochs": [3],
        "training.threads": [1],
    }
    search = tuning.Search(space, 3)
    here = tuning.tune(make_config(simulated, tmp_path / "here", "s"), search)
    killed = tmp_path / "killed"
    killed.mkdir()
    monkeypatch.setattr(MortalMapper, "folder", killed)
    monkeypatch.setattr(MortalMapper, "task", "tune, rung 1 of 2")
    config = make_config(simulated, tmp_path / "away", "s")
    there = tuning.tune(config, search, execution=Execution(MortalMapper(2)))
    assert list(killed.iterdir())
    assert there.trials == here.trials and [t.stopped for t in there.trials] == [False, True, True]
    best = there.best.number
    assert_same_policy(*(tmp_path / name / f"s-tune-{best:03d}" for name in ("here", "away")))


@pytest.mark.slow
def test_a_range_of_workers_begins_with_those_that_there_is_room_for(
    ray_cluster: str, simulated: Path, tmp_path: Path
) -> None:
    """From one to five workers of two CPUs each, where there are four CPUs."""
    alone = config_of(simulated, tmp_path / "alone", "a", "item_sharded", "training.epochs=1")
    train_run(alone)
    config = config_of(simulated, tmp_path / "ray", "a", "item_sharded", "training.epochs=1")
    manifest = train_on_ray(config, WorkerPlan((1, 5), cpus=2.0, timeout=60.0))
    assert manifest["workers"] == 2
    assert_near(alone.run_directory, config.run_directory, simulated)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_more_workers_than_row_groups(ray_cluster: str, tmp_path: Path) -> None:
    """Three workers, and a log of two row groups: of the third worker nothing is read, and its
    rows are those that the others send it. The bits of plain workers; near one process."""
    folder = write_world(tmp_path / "world", rows=200)
    assert len(ParquetLog.open(folder / "train").row_group_sizes) == 2
    steps = ("training.epochs=1", "training.batch_size=16")
    alone, plain, on_ray = (
        config_of(folder, tmp_path / name, "a", "item_sharded", *steps)
        for name in ("alone", "plain", "ray")
    )
    train_run(alone)
    run_workers(3, train, plain)
    manifest = train_on_ray(on_ray, WorkerPlan(3, cpus=0.5, timeout=60.0))
    assert manifest["workers"] == 3
    assert_same_policy(on_ray.run_directory, plain.run_directory)
    assert_near(alone.run_directory, on_ray.run_directory, folder)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_run_continues_on_a_new_cluster_after_the_head_was_lost(
    ray_cluster: str, simulated: Path, tmp_path: Path
) -> None:
    """The first cluster is killed with its head, its workers and the command."""
    whole = config_of(simulated, tmp_path / "whole", "a", "item_sharded", "training.epochs=3")
    run_workers(2, train, whole)
    more = ("training.epochs=3", EVERY_STEP)
    config = config_of(simulated, tmp_path / "lost", "a", "item_sharded", *more)
    path, run = tmp_path / "config.yaml", config.run_directory
    path.write_text(to_yaml(config))
    command = [sys.executable, "-m", "offtower.cli", "train", str(path), "--workers", "2"]
    first = subprocess.Popen(command, env={**os.environ, **RAY_ENVIRONMENT}, start_new_session=True)
    while first.poll() is None and not list((run / "checkpoints").glob("step_*")):
        time.sleep(0.02)
    assert first.poll() is None
    # The session's own cluster goes on: only what descends from the command is killed.
    for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    first.wait()
    assert not (run / "policy").exists()
    train_on_ray(config, WorkerPlan(2, timeout=60.0), resume=True)
    assert_same_policy(run, whole.run_directory)
