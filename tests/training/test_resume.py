"""A run that is killed at any moment, and resumed, ends with the same policy, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file, save_file

from offtower.atomic import sha256_file
from offtower.checksums import read_checked_json, write_checked_json
from offtower.config import Config, to_yaml
from offtower.errors import RunError, StoppedError
from offtower.execution import Execution
from offtower.interruption import Interruption
from offtower.metrics import read_metrics
from offtower.run_directory import RunDirectory
from offtower.training.checkpoints import CheckpointStore
from offtower.training.run import train_run
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.distributed.processes import START, start_offtower


def config_of(folder: Path, runs: Path, name: str, *more: str) -> Config:
    """Three epochs, with a checkpoint of each step."""
    return make_config(folder, runs, name, EVERY_STEP, "training.epochs=3", *more)


RARE = "training.checkpoint_every_seconds=1e9"


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "policy" / "policy.safetensors")


def assert_same_policy(one: Path, two: Path) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    config = config_of(simulated, runs, "whole")
    train_run(config)
    return config.run_directory


def test_the_same_run_twice_gives_the_same_bits(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    config = config_of(simulated, tmp_path, "whole", RARE)
    train_run(config)
    assert_same_policy(config.run_directory, uninterrupted)


def test_another_seed_gives_another_policy(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    config = config_of(simulated, tmp_path, "other", RARE, "seed=4")
    train_run(config)
    one, two = weights(config.run_directory), weights(uninterrupted)
    assert any(not np.array_equal(one[name], two[name]) for name in one)


def _resume(config: Config) -> None:
    train_run(config, resume=True)


def test_killed_at_any_moment_and_resumed(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """SIGKILL after random delays, again and again, until a start runs to its end."""
    config = config_of(simulated, tmp_path, "whole")
    processes = multiprocessing.get_context(START)
    run = config.run_directory
    rng = np.random.default_rng(7)

    def newest() -> str:
        found = sorted((run / "checkpoints").glob("step_*")) if run.exists() else []
        return found[-1].name if found else ""

    def started() -> bool:
        return run.exists()

    # Twice in the preparation and the reward model's fit, then four times in the loop itself, where
    # every step writes a checkpoint: kills fall on steps, writes, renames and validations.
    places: list[str] = []
    for kill in range(6):
        before = newest()
        process = processes.Process(target=_resume, args=(config,))
        process.start()
        began = time.monotonic()
        moved = started if kill < 2 else lambda before=before: newest() != before
        while not moved() and process.is_alive() and time.monotonic() - began < 60:
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.12)))
        process.kill()
        process.join(timeout=60)
        places.append(newest())
    # The kills fell on at least three different steps of the loop.
    assert len(set(places) - {""}) >= 3
    last = processes.Process(target=_resume, args=(config,))
    last.start()
    last.join(timeout=120)
    assert last.exitcode == 0
    assert_same_policy(run, uninterrupted)
    # No line is lost or written twice.
    assert metrics_steps(run) == metrics_steps(uninterrupted)


class StopAfter(Interruption):
    """Asks to stop at the k-th question, the first of which comes after the first step."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left <= 0


def metrics_steps(run: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_metrics(run / "metrics.jsonl")]


def test_stopped_on_request_and_resumed(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """After the last step of an epoch, before its validation; inside one; and after a validation.
    Each stop has the checkpoint of its step, though none is due by the clock."""
    config = config_of(simulated, tmp_path, "whole", RARE)
    first, second, *_ = (s for kind, s in metrics_steps(uninterrupted) if kind == "epoch")
    # The end of an epoch asks once more.
    stops = ((first, first), (1 + 10, first + 10), (second - first - 10 + 1, second))
    for questions, step in stops:
        execution = Execution(interruption=StopAfter(questions))
        with pytest.raises(StoppedError, match=f"after step {step}; --resume"):
            train_run(config, resume=True, execution=execution)
        newest = sorted((config.run_directory / "checkpoints").glob("step_*"))[-1]
        assert int(newest.name[5:]) == step
    train_run(config, resume=True)
    assert_same_policy(config.run_directory, uninterrupted)
    assert metrics_steps(config.run_directory) == metrics_steps(uninterrupted)


@pytest.mark.timeout(120)
def test_sigterm_writes_a_checkpoint_and_exits_with_143(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    config = config_of(simulated, tmp_path, "whole", RARE, "training.log_every_steps=1")
    path, run = tmp_path / "config.yaml", config.run_directory
    path.write_text(to_yaml(config))
    process = start_offtower(["train", str(path)], tmp_path / "errors")
    try:
        while process.is_alive() and len(_lines(run / "metrics.jsonl")) < 3:
            time.sleep(0.01)
        process.terminate()
        process.join(timeout=60)
    finally:
        process.kill()
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 143 and "training stopped on request after step" in errors
    assert sorted((run / "checkpoints").glob("step_*"))
    train_run(config, resume=True)
    assert_same_policy(run, uninterrupted)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    config = copied(uninterrupted, simulated, tmp_path)
    run = RunDirectory(config.run_directory)
    newest = sorted(run.checkpoints.glob("step_*"))[-1]
    tensors = next(newest.glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-20] ^= 0xFF
    tensors.write_bytes(bytes(content))
    train_run(config, resume=True)
    assert_same_policy(config.run_directory, uninterrupted)
    assert run.manifest()["checkpoints_skipped"] == [f"{newest.name}: {tensors.name} is damaged"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(lambda content: b"\xff" + content[1:], id="not UTF-8"),
        pytest.param(lambda content: content.replace(b'"step": ', b'"stop": ', 1), id="key"),
        pytest.param(lambda content: content.replace(b'"step": ', b'"step": 1', 1), id="number"),
        pytest.param(lambda content: content.replace(b'"step": ', b'"step": "', 1), id="quote"),
        pytest.param(lambda content: b"[]", id="list"),
        pytest.param(lambda content: b"", id="empty"),
    ],
)
def test_any_damage_to_the_newest_state_falls_back(
    simulated: Path,
    tmp_path: Path,
    uninterrupted: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = copied(uninterrupted, simulated, tmp_path)
    run = RunDirectory(config.run_directory)
    newest = sorted(run.checkpoints.glob("step_*"))[-1]
    state = newest / "state.json"
    before = state.read_bytes()
    state.write_bytes(damage(before))
    assert state.read_bytes() != before
    train_run(config, resume=True)
    assert_same_policy(config.run_directory, uninterrupted)
    assert run.manifest()["checkpoints_skipped"][0].startswith(f"{newest.name}: ")
    assert f"'{newest}' is skipped" in caplog.text


def test_a_checkpoint_that_does_not_fit_the_policy_falls_back(
    simulated: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """Its checksums are right, but tensors are missing or have other shapes."""
    for change in ("missing", "shape"):
        config = copied(uninterrupted, simulated, tmp_path / change)
        run = RunDirectory(config.run_directory)
        newest = sorted(run.checkpoints.glob("step_*"))[-1]
        file = next(newest.glob("*.safetensors"))
        with safetensors.safe_open(file, "np") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        name = next(name for name in tensors if name.startswith("policy/"))
        value = tensors.pop(name)
        if change == "shape":
            tensors[name] = np.zeros((*value.shape, 2), value.dtype)
        save_file(tensors, file, metadata)
        state = read_checked_json(newest / "state.json")
        state["files"][file.name] = sha256_file(file)
        write_checked_json(newest / "state.json", state)
        train_run(config, resume=True)
        assert_same_policy(config.run_directory, uninterrupted)
        (skipped,) = run.manifest()["checkpoints_skipped"]
        assert newest.name in skipped


def copied(run: Path, simulated: Path, folder: Path) -> Config:
    """The configuration of a finished run in another folder, and a copy of that run there."""
    config = config_of(simulated, folder, run.name)
    shutil.copytree(run, config.run_directory)
    (config.run_directory / "config.yaml").write_text(to_yaml(config))
    shutil.rmtree(config.run_directory / "policy")
    return config


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Checkpoints beyond the first `after` are half written, and fail. Of those, all but the last
    three are left out: a run would remove them again."""
    save, calls = dcp.save, []
    save_step = CheckpointStore.save

    def rare(self: CheckpointStore, *arguments: Any) -> None:
        if len(calls) < after - 3:
            calls.append(1)
        else:
            save_step(self, *arguments)

    def full(state: Any, **arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            folder = Path(arguments["storage_writer"].path)
            (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return save(state, **arguments)

    monkeypatch.setattr(dcp, "save", full)
    monkeypatch.setattr(CheckpointStore, "save", rare)


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    simulated: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(simulated, tmp_path, "whole")
    fill_the_disk(monkeypatch, after=30)
    with pytest.raises(RunError, match=r"No space left.*newest whole one is step_.*--resume"):
        train_run(config)
    monkeypatch.undo()
    assert not list(config.run_directory.rglob("*.partial"))
    train_run(config, resume=True)
    assert_same_policy(config.run_directory, uninterrupted)


def test_names_that_are_taken(simulated: Path, tmp_path: Path) -> None:
    config = make_config(simulated, tmp_path, "a", "training.epochs=1")
    train_run(config)
    with pytest.raises(RunError, match="Pass --resume"):
        train_run(config)
    other = make_config(simulated, tmp_path, "a", "training.epochs=2")
    with pytest.raises(RunError, match=r"training.epochs \(1 -> 2\)"):
        train_run(other, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="not empty and holds no run"):
        train_run(make_config(simulated, tmp_path, "mine", "training.epochs=1"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_changed_data_are_noticed(simulated: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(simulated, data)
    config = make_config(data, tmp_path / "runs", "a", "training.epochs=1")
    train_run(config)
    shutil.rmtree(data / "train")
    shutil.copytree(data / "validation", data / "train")
    with pytest.raises(RunError, match="log or the catalogue changed"):
        train_run(config, resume=True)


def test_manifest_and_metrics_say_what_happened(uninterrupted: Path) -> None:
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert manifest["training_rows"] == 600
    assert manifest["epochs"] == 3
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert len(epochs) == 3
    for key in (
        "loss",
        "value_estimate",
        "effective_sample_size",
        "largest_weight",
        "entropy",
        "rows_per_second",
        "waiting_share",
    ):
        assert epochs[0][key] is not None, key
    lows = [line["validation"]["low"] for line in epochs]
    best = epochs[int(np.argmax(lows))]
    assert manifest["selected_step"] == best["step"]
