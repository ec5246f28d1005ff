"""SIGTERM and Ray's notice of a drained node: a checkpoint before the workers end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offtower.config import to_yaml
from tests.jobs.conftest import RAY_ENVIRONMENT
from tests.training.distributed.test_runs import config_of

pytestmark = pytest.mark.ray

NO_CLOCK = ("training.checkpoint_every_seconds=1e6", "training.log_every_steps=1")
"""No checkpoint is due but that of an epoch's end."""


def newest(run: Path) -> int:
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step_*")), default=0)


@pytest.mark.timeout(600)
def test_sigterm_of_the_command_stops_the_workers_with_a_checkpoint(
    simulated: Path, tmp_path: Path
) -> None:
    config = config_of(simulated, tmp_path, "a", "replicated", *NO_CLOCK, "training.epochs=200")
    path, run = tmp_path / "config.yaml", config.run_directory
    path.write_text(to_yaml(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "offtower.cli", "train", str(path), "--workers", "2"],
        env={**os.environ, **RAY_ENVIRONMENT},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and newest(run) == 0:
            time.sleep(0.05)
        before = newest(run)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, errors[-3000:]
    assert "stopping: the workers write a checkpoint" in errors
    assert f"training stopped on request after step {newest(run):,}" in errors
    assert newest(run) > before


@pytest.mark.timeout(900)
def test_a_drained_node_has_a_checkpoint_and_training_goes_on(
    simulated: Path, tmp_path: Path
) -> None:
    """Between the notice and the removal of the node no checkpoint is due by the clock."""
    config = config_of(simulated, tmp_path, "a", "item_sharded", *NO_CLOCK, "training.epochs=60")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    result = subprocess.run(
        [sys.executable, "-m", "tests.jobs.lost_node", str(path), "9", "drain"],
        env={**os.environ, **RAY_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "a checkpoint after the notice" in result.stdout
    assert "ended with 1 worker(s)" in result.stdout
