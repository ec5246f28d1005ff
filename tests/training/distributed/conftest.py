"""The world of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.distributed.world import write_world


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("with_ids"))
