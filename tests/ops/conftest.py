"""Fixtures of the operators' tests."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.ops import cuda_emulation


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The CUDA kernels on an emulated thread block."""
    return cuda_emulation.build()
