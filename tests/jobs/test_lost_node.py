"""A node goes away in the middle of a job: its parts run again on those that are left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def test_parts_of_a_lost_node_run_again(ray_environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = Path(__file__).parent / "lost_node.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok" in done.stdout
