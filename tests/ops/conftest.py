"""What tests of the operators share."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.ops import cuda_emulation


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels on an emulated thread block, compiled once."""
    return cuda_emulation.build(Path(tmp_path_factory.mktemp("emulation")))
