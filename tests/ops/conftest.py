"""What tests of the operators share."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from tests.ops import cuda_emulation


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels on an emulated thread block, compiled once."""
    base = tmp_path_factory.getbasetemp()
    # A process of several has its folder below that of the whole test run.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "emulation"
    folder.mkdir(exist_ok=True)
    return cuda_emulation.build(folder)
