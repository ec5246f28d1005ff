"""Trackers of training metrics besides metrics.jsonl: TensorBoard and MLflow."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from offtower.atomic import write_text
from offtower.config import Config, to_stored_dict
from offtower.errors import MissingExtraError, RunError
from offtower.paths import HIDDEN, redact

logger = logging.getLogger("offtower.tracking")

_FILE = "mlflow.json"
ANSWER_SECONDS = 5
"""Timeout of one request to an MLflow server; it is retried once."""
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_SECONDS),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""MLflow's defaults retry for many minutes. Variables that the user has set stay."""


class Tracker(ABC):
    """Receives every line of the metrics."""

    @abstractmethod
    def write(self, line: Mapping[str, Any]) -> None:
        """Record a line: its kind (step or epoch), step, and numbers."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """End the run."""


def make_trackers(config: Config, run_path: Path) -> list[Tracker]:
    """Make the trackers of `config.tracking`.

    Raises:
        MissingExtraError: a package is not installed.
        RunError: the MLflow store cannot be used; for a server this is a warning.
    """
    trackers: list[Tracker] = []
    if config.tracking.tensorboard:
        trackers.append(TensorBoard(run_path / "tensorboard"))
    uri = config.tracking.mlflow
    if uri is not None:
        try:
            trackers.append(MLflow(uri, config.tracking.mlflow_experiment, config, run_path))
        except RunError as error:
            if not uri.startswith(("http://", "https://")):
                raise
            logger.warning("training goes on without MLflow: %s", error)
    return trackers


def numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield names and finite numbers of a line: epoch/loss, epoch/validation/low, ..."""
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

    A resumed run writes repeated steps again; TensorBoard shows the later points (purge_step).
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
    """One MLflow run for a run directory, continued when the run is resumed.

    After a failed request nothing more is sent. Credentials in the URI are not stored; a stored
    configuration uses MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.

    Args:
        uri: of the tracking server.
        experiment: name; created if missing.
    """

    def __init__(self, uri: str, experiment: str, config: Config, run_path: Path) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise MissingExtraError("mlflow-skinny", "tracking", "tracking.mlflow") from error
        known, self._lost = run_path / _FILE, False
        try:
            for name, value in _PATIENCE.items():
                os.environ.setdefault(name, value)
            self._client = MlflowClient(tracking_uri=uri.replace(f"{HIDDEN}@", ""))
            if known.exists():
                self._run = str(json.loads(known.read_text(encoding="utf-8"))["run_id"])
                self._client.update_run(self._run, status="RUNNING")
                return
            found = self._client.get_experiment_by_name(experiment)
            number = (
                self._client.create_experiment(experiment) if found is None else found.experiment_id
            )
            self._run = self._client.create_run(number, run_name=config.name).info.run_id
            for name, value in _flat("", to_stored_dict(config)):
                self._client.log_param(self._run, name, value)
        except (MlflowException, OSError, ValueError, KeyError) as error:
            raise RunError(
                f"MLflow at '{redact(uri)}' cannot be used: {redact(str(error))}. Correct "
                "tracking.mlflow (credentials: MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD), or leave it out; metrics.jsonl is written in any case"
            ) from None
        write_text(known, json.dumps({"uri": redact(uri), "run_id": self._run}))

    def write(self, line: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), int(line["step"])
        metrics = [Metric(name, value, now, step) for name, value in numbers(line)]
        self._send(lambda: self._client.log_batch(self._run, metrics=metrics))

    def close(self) -> None:
        self._send(lambda: self._client.set_terminated(self._run))

    def _send(self, request: Callable[[], Any]) -> None:
        """Make a request unless one has failed, so that training waits for a lost server once."""
        from mlflow.exceptions import MlflowException

        if self._lost:
            return
        try:
            request()
        except (MlflowException, OSError) as error:
            self._lost = True
            logger.warning(
                "MLflow failed and receives no more metrics; metrics.jsonl has all of them: %s",
                redact(str(error)),
            )


def _flat(prefix: str, content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", str(value)[:500]
