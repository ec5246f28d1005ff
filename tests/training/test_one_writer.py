"""One process writes to a run: others are refused, and a superseded one stops."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from offtower.config import Config, to_yaml
from offtower.data import lease
from offtower.data.lease import Lease
from offtower.data.lease_files import FOLDER
from offtower.errors import ConfigError, DataError, LeaseError, RunError
from offtower.models.store import policy_digest
from offtower.retrieval.export import export_run
from offtower.retrieval.export_options import ExportOptions
from offtower.run_claim import ClaimedRun, claim_run, join_run
from offtower.training import tune as tuning
from offtower.training.checkpoints import CheckpointStore, Progression
from offtower.training.run import train_run
from offtower.training.trainer import EpochHook
from offtower.training.workers import Workers
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.distributed.processes import run_workers, start_offtower
from tests.training.test_resume import assert_same_policy

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test passes because a heartbeat became too old."""
    monkeypatch.setattr(lease, "STALE_SECONDS", 1e9)


@pytest.fixture(scope="module")
def uninterrupted(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of(simulated, tmp_path_factory.mktemp("whole"))
    train_run(config)
    return config.run_directory


def config_of(data: Path, runs: Path, *more: str) -> Config:
    return make_config(data, runs, "run", "training.epochs=2", *more)


def after_first_epoch(work: Callable[[], object]) -> Callable[[Any], EpochHook]:
    """A hook of `train_run` that calls `work` while the run is half done."""

    def at(policy: object, epoch: int) -> dict[str, float]:
        if epoch == 0:
            with torch.enable_grad():
                work()
        return {}

    return lambda data: at


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a run, without those of its lease."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and FOLDER not in path.parts
    }


def start(config: Config, folder: Path, *options: str) -> BaseProcess:
    """`offtower train` in another process, which writes its errors to <folder>/errors."""
    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    return start_offtower(["train", str(path), *options], folder / "errors")


def test_of_two_that_resume_one_run_one_goes_on(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    config = config_of(simulated, tmp_path)
    codes: list[int | None] = []

    def resume_too() -> None:
        second = start(config, tmp_path, "--resume")
        second.join(timeout=120)
        codes.append(second.exitcode)

    train_run(config, hook=after_first_epoch(resume_too))
    assert codes == [2]
    text = " ".join((tmp_path / "errors").read_text().split())
    assert f"is being written by process {os.getpid()} on host" in text
    assert "--take-over goes on in its place" in text
    assert_same_policy(config.run_directory, uninterrupted)


def test_the_run_of_a_killed_process_is_resumed_at_once(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    config = config_of(simulated, tmp_path)
    first = start(config, tmp_path)
    checkpoints = config.run_directory / "checkpoints"
    while not list(checkpoints.glob("step_*")):
        assert first.is_alive()
        time.sleep(0.01)
    first.kill()
    first.join(timeout=60)
    train_run(config, resume=True)
    assert_same_policy(config.run_directory, uninterrupted)


def test_a_run_that_was_taken_over_stops_and_leaves_no_file(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    config = config_of(simulated, tmp_path, EVERY_STEP)
    after: dict[str, str] = {}

    def take_over() -> None:
        with pytest.raises(LeaseError, match="--take-over"):
            train_run(config, resume=True)
        train_run(config, take_over=True)
        after.update(contents(config.run_directory))

    with pytest.raises(LeaseError, match=r"taken over by process \d+ .*stops"):
        train_run(config, hook=after_first_epoch(take_over))
    assert contents(config.run_directory) == after
    assert_same_policy(config.run_directory, uninterrupted)


class Superseded(ClaimedRun):
    """A claim that is lost before the given check."""

    def __init__(self, path: Path, checks: int) -> None:
        super().__init__(path)
        self._checks = checks

    def check_owner(self) -> None:
        self._checks -= 1
        if self._checks < 0:
            raise LeaseError("taken over")


def save_while_superseded(workers: Workers, run: Path, checks: int) -> None:
    policy = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    claimed = Superseded(run, checks) if workers.first else ClaimedRun(run)
    store = CheckpointStore(run / "checkpoints", "a", 2, workers, run=claimed)
    progression = Progression.from_dict(
        {"cursor": {"epoch": 0, "window": 0, "batch": 0}, "step": 5}
    )
    with pytest.raises(LeaseError, match="taken over"):
        store.save(policy, optimizer, progression)
        store.finish()


def test_no_worker_completes_a_checkpoint_of_a_lost_run(tmp_path: Path) -> None:
    """The loss is noticed before tensors are written, and after."""
    for checks in (0, 1):
        run_workers(2, save_while_superseded, tmp_path / str(checks), checks)
        assert not list((tmp_path / str(checks) / "checkpoints").iterdir())


def test_a_late_checkpoint_of_an_earlier_owner_is_removed(tmp_path: Path) -> None:
    policy = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    store = CheckpointStore(tmp_path, "a", kept=1)
    late = tmp_path / "step_000000000099"
    late.mkdir()
    for step in (5, 6):
        place = {"cursor": {"epoch": 0, "window": 0, "batch": step}, "step": step}
        store.save(policy, optimizer, Progression.from_dict(place))
        assert [path.name for path in tmp_path.iterdir()] == [f"step_{step:012d}"]


def test_checkpoints_name_the_token_of_their_owner(simulated: Path, tmp_path: Path) -> None:
    config = config_of(simulated, tmp_path, "training.epochs=1")
    train_run(config)
    shutil.rmtree(config.run_directory / "checkpoints")
    train_run(config, resume=True)
    states = list((config.run_directory / "checkpoints").glob("step_*/state.json"))
    assert states and all('"fencing_token": 2' in path.read_text() for path in states)


def test_a_worker_elsewhere_writes_until_its_head_is_superseded(
    simulated: Path, tmp_path: Path
) -> None:
    config = config_of(simulated, tmp_path)
    with claim_run(config) as head, join_run(head.key) as worker:
        worker.update_manifest({"by": "worker"})
        with claim_run(config, take_over=True) as successor:
            with pytest.raises(LeaseError, match="taken over"):
                worker.update_manifest({"by": "outlived"})
            assert successor.manifest() == {"by": "worker"}


def test_a_run_that_is_refused_leaves_nothing(simulated: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        train_run(config_of(simulated, tmp_path, "data.train=nowhere"))
    assert not list(tmp_path.iterdir())
    # Refused after the encodings were fitted: another configuration will be another run.
    with pytest.raises(ConfigError, match="needs a reward model"):
        train_run(config_of(simulated, tmp_path, "objective.name=dr", "reward_model.kind=none"))
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_before_it_had_a_configuration_begins(
    simulated: Path, tmp_path: Path
) -> None:
    config = config_of(simulated, tmp_path, "training.epochs=1")
    config.run_directory.mkdir()
    (config.run_directory / ".config.yaml.1.ab.partial").write_text("na")
    Lease.acquire(config.run_directory).release()
    train_run(config)
    assert (config.run_directory / "policy" / "policy.json").exists()


def test_two_machines_with_one_copy(simulated: Path, tmp_path: Path) -> None:
    """Each has a run directory of its own; the copy has one owner."""
    here, there = (config_of(simulated, tmp_path / name, EVERY_STEP) for name in ("here", "there"))
    uri = f"file://{tmp_path}/copies"
    copy = tmp_path / "copies" / "run"
    after: dict[str, str] = {}

    def take_over() -> None:
        with pytest.raises(LeaseError, match=r"copies/run' is being written by process"):
            train_run(there, resume=True, mirror=uri)
        assert not there.run_directory.exists()
        train_run(there, take_over=True, mirror=uri)
        after.update(contents(copy))

    with pytest.raises(LeaseError, match=r"copies/run' was taken over"):
        train_run(here, mirror=uri, hook=after_first_epoch(take_over))
    assert contents(copy) == after
    assert_same_policy(copy, there.run_directory)


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_a_copy_whose_arrival_was_cut_short_is_fetched_again(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    config = config_of(simulated, tmp_path / "here", "training.epochs=1")
    uri = f"file://{tmp_path}/copies"
    train_run(config, mirror=uri)
    digest = policy_digest(config.run_directory / "policy")
    shutil.rmtree(tmp_path / "here")
    replace, calls = os.replace, []

    def killed(old: Any, new: Any) -> None:
        if len(calls) == moved:
            raise KeyboardInterrupt
        calls.append(new)
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("offtower.mirror.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, resume=True, mirror=uri)
    assert not (config.run_directory / "config.yaml").exists()
    train_run(config, resume=True, mirror=uri)
    assert policy_digest(config.run_directory / "policy") == digest


def test_a_search_has_one_owner(simulated: Path, tmp_path: Path) -> None:
    config = config_of(simulated, tmp_path, "training.epochs=1")
    space = {"training.learning_rate": [0.01, 0.003]}
    said: list[str] = []

    def search_too(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            with pytest.raises(LeaseError, match=r"run-tune' is being written"):
                tuning.tune(config, tuning.Search(space), resume=True)
            tuning.tune(config, tuning.Search(space), take_over=True)

    with pytest.raises(LeaseError, match=r"run-tune' was taken over"):
        tuning.tune(config, tuning.Search(space), say=search_too)
    assert (tmp_path / "run-tune" / "trials.json").exists()


def test_a_refused_trial_is_not_taken_for_a_failed_one(simulated: Path, tmp_path: Path) -> None:
    config = config_of(simulated, tmp_path, "training.epochs=1")
    with (
        Lease.acquire(tmp_path / "run-tune-000"),
        pytest.raises(LeaseError, match="run-tune-000' is being written"),
    ):
        tuning.tune(config, tuning.Search({"training.learning_rate": [0.01]}))


def test_an_export_has_one_owner(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    export = tmp_path / "run" / "export"
    with Lease.acquire(export), pytest.raises(LeaseError, match="export' is being written"):
        export_run(tmp_path / "run", ExportOptions(index=None))
    with pytest.raises(RunError):
        export_run(tmp_path / "nowhere")
