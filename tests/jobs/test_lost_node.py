"""Elastic training continues after a node is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offtower.config import to_yaml
from offtower.metrics import read_metrics
from offtower.training.run import train_run
from tests.jobs.conftest import RAY_ENVIRONMENT
from tests.training.conftest import EVERY_STEP
from tests.training.distributed.test_runs import assert_near, config_of

pytestmark = pytest.mark.ray


@pytest.mark.timeout(600)
def test_training_goes_on_with_the_workers_that_are_left(simulated: Path, tmp_path: Path) -> None:
    """Two workers, then one: the policy of one process to rounding, and no metrics line twice."""
    alone = config_of(simulated, tmp_path / "alone", "a", "item_sharded")
    train_run(alone)
    config = config_of(simulated, tmp_path / "ray", "a", "item_sharded", EVERY_STEP)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    result = subprocess.run(
        [sys.executable, "-m", "tests.jobs.lost_node", str(path), "9"],
        env={**os.environ, **RAY_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ended with 1 worker(s)" in result.stdout
    assert_near(alone.run_directory, config.run_directory, simulated)
    steps, wanted = (
        [(m["kind"], m["step"]) for m in read_metrics(c.run_directory / "metrics.jsonl")]
        for c in (config, alone)
    )
    assert steps == wanted
