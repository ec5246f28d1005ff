"""Metrics beside metrics.jsonl: the same numbers, at the same steps."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from offtower import tracking
from offtower.errors import RunError
from offtower.metrics import read_metrics
from offtower.tracking import numbers
from offtower.training.run import train_run
from tests.training.conftest import make_config


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """By name, (step, value) in order, from metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(run / "metrics.jsonl"):
        for name, value in numbers(line):
            found.setdefault(name, []).append((line["step"], value))
    assert {"step/loss", "epoch/loss", "epoch/validation/low"} <= set(found)
    return found


def test_names_of_numbers() -> None:
    line = {
        "kind": "epoch",
        "step": 3,
        "epoch": 0,
        "loss": 0.5,
        "entropy": None,
        "worse": float("nan"),
        "validation": {"low": 1, "estimator": "snips", "good": True},
    }
    assert dict(numbers(line)) == {"epoch/loss": 0.5, "epoch/validation/low": 1.0}


def test_tensorboard(simulated: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(simulated, tmp_path, "a", "training.epochs=2", "tracking.tensorboard=true")
    train_run(config)
    events = accumulator.EventAccumulator(str(config.run_directory / "tensorboard"))
    events.Reload()
    wanted = expected(config.run_directory)
    assert set(events.Tags()["scalars"]) == set(wanted)
    for name, points in wanted.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in points]
        assert [v for _, v in found] == pytest.approx([v for _, v in points], rel=1e-6)


def test_mlflow_goes_on_with_its_run(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of files stands for a server."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}/mlruns"
    config = make_config(simulated, tmp_path, "a", "training.epochs=2", f"tracking.mlflow={uri}")
    train_run(config)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("offtower")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "a" and run.info.status == "FINISHED"
    assert run.data.params["objective.name"] == "dr"
    for name, points in expected(config.run_directory).items():
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda m: m.step)
        assert [(m.step, m.value) for m in history] == points
    train_run(config, resume=True)
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_an_mlflow_that_cannot_be_used(simulated: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "taken").write_text("a file")
    config = make_config(simulated, tmp_path, "a", f"tracking.mlflow=nonsense://{tmp_path}/taken")
    with pytest.raises(RunError, match=r"tracking\.mlflow"):
        train_run(config)


def test_training_goes_on_without_a_server(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """One that accepts connections and never answers: training warns and ends, with its metrics."""
    pytest.importorskip("mlflow")
    for name in tracking._PATIENCE:
        monkeypatch.setenv(name, "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://me:SECRET@127.0.0.1:{silent.getsockname()[1]}"
        config = make_config(simulated, tmp_path, "a", f"tracking.mlflow={uri}")
        train_run(config)
    assert "training goes on without MLflow" in caplog.text and "http://***@127" in caplog.text
    expected(config.run_directory)
    stored = (config.run_directory / "config.yaml").read_text()
    assert "http://***@127.0.0.1" in stored
    assert "SECRET" not in stored + caplog.text


def test_default_patience_is_seconds() -> None:
    """MLflow's own is 120 seconds for each of 8 attempts."""
    timeout, retries = (int(value) for value in tracking._PATIENCE.values())
    assert timeout * (1 + retries) <= 10


def test_a_server_that_is_lost_on_the_way(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    exceptions = pytest.importorskip("mlflow.exceptions")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = make_config(simulated, tmp_path, "a", f"tracking.mlflow=file:{tmp_path}/mlruns")
    sent: list[int] = []

    def log_batch(*arguments: Any, **named: Any) -> None:
        sent.append(1)
        raise exceptions.MlflowException("gone: http://me:SECRET@host")

    monkeypatch.setattr("mlflow.MlflowClient.log_batch", log_batch)
    train_run(config)
    assert len(sent) == 1
    assert caplog.text.count("MLflow failed") == 1 and "SECRET" not in caplog.text
    expected(config.run_directory)
