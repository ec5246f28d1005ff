"""Where metrics go beside metrics.jsonl: TensorBoard, MLflow, or any function of a line."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offtower.atomic import write_text
from offtower.config import Config, to_dict
from offtower.errors import MissingExtraError, RunError

_FILE = "mlflow.json"


class Tracker(ABC):
    """Gets every line of the metrics when it is written."""

    @abstractmethod
    def write(self, line: Mapping[str, Any]) -> None:
        """One line: its kind (step or epoch), its step, and numbers."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """The run has ended."""


def make_trackers(config: Config, run_path: Path) -> list[Tracker]:
    """As `config.tracking` says.

    Raises:
        MissingExtraError: a package is not installed.
        RunError: the MLflow server cannot be reached.
    """
    trackers: list[Tracker] = []
    if config.tracking.tensorboard:
        trackers.append(TensorBoard(run_path / "tensorboard"))
    if config.tracking.mlflow is not None:
        trackers.append(
            MLflow(config.tracking.mlflow, config.tracking.mlflow_experiment, config, run_path)
        )
    return trackers


def numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and finite numbers of a line: epoch/loss, epoch/validation/low, ..."""
    yield from _numbers(str(line["kind"]), line)


def _numbers(prefix: str, content: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}/{name}", value)
        elif name in ("kind", "step", "epoch") or isinstance(value, bool):
            continue
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield f"{prefix}/{name}", float(value)


class TensorBoard(Tracker):
    """Event files in a folder of the run.

    After a resumption points of steps that are taken again are written again; TensorBoard shows
    the later ones (purge_step).
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tracking", "tracking.tensorboard") from error
        self._make, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def write(self, line: Mapping[str, Any]) -> None:
        step = int(line["step"])
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=step)
        for name, value in numbers(line):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflow(Tracker):
    """One MLflow run for a run directory, gone on with after a resumption.

    Args:
        uri: of the tracking server.
        experiment: name; made where it is not there.
    """

    def __init__(self, uri: str, experiment: str, config: Config, run_path: Path) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise MissingExtraError("mlflow-skinny", "tracking", "tracking.mlflow") from error
        known = run_path / _FILE
        try:
            self._client = MlflowClient(tracking_uri=uri)
            if known.exists():
                self._run = str(json.loads(known.read_text(encoding="utf-8"))["run_id"])
                self._client.update_run(self._run, status="RUNNING")
                return
            found = self._client.get_experiment_by_name(experiment)
            number = (
                self._client.create_experiment(experiment) if found is None else found.experiment_id
            )
            self._run = self._client.create_run(number, run_name=config.name).info.run_id
            for name, value in _flat("", to_dict(config)):
                self._client.log_param(self._run, name, value)
        except (MlflowException, OSError, ValueError, KeyError) as error:
            raise RunError(
                f"MLflow at '{uri}' cannot be used: {error}. Correct tracking.mlflow, or leave it "
                "out; metrics.jsonl is written in any case"
            ) from error
        write_text(known, json.dumps({"uri": uri, "run_id": self._run}))

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line):
            self._client.log_metric(self._run, name, value, step=int(line["step"]))

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _flat(prefix: str, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", str(value)[:500]
