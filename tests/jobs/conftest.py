"""One Ray cluster for the test session, with short timeouts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offtower.progress import Progress
from tests.training.distributed.world import write_world

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}
"""Set before Ray starts; workers inherit it."""
OBJECT_STORE_BYTES = 300_000_000


@pytest.fixture(scope="session")
def ray_environment() -> Iterator[dict[str, str]]:
    """Set the environment of Ray tests, and restore it at the end."""
    before = {name: os.environ.get(name) for name in RAY_ENVIRONMENT}
    os.environ.update(RAY_ENVIRONMENT)
    yield dict(RAY_ENVIRONMENT)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def ray_cluster(ray_environment: dict[str, str]) -> Iterator[str]:
    """A cluster of one node with four logical CPUs, for the whole session; gives its address.

    `connect` of the code under test joins it, because this process is connected.
    """
    pytest.importorskip("ray")
    from offtower.jobs.connect import connect

    # Not /tmp/ray, which other clusters of the machine use; short, for the sockets' sake.
    folder = tempfile.mkdtemp(prefix="ot-ray-", dir="/tmp")
    try:
        with connect(
            "local", num_cpus=4, object_store_memory=OBJECT_STORE_BYTES, temp_dir=folder
        ) as cluster:
            yield cluster.address
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small log whose catalogue has item ids."""
    return write_world(tmp_path_factory.mktemp("with_ids"))


class Recorded(Progress):
    """Keeps the reports as lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, task: str, total: int | None) -> None:
        self.lines.append(f"start {task} {total}")

    def advance(self, amount: int, note: str = "") -> None:
        if amount:
            self.lines.append(f"{amount} {note}")

    def note(self, message: str) -> None:
        self.lines.append(message)
