"""Fixtures of the operators' tests."""

from __future__ import annotations

from types import ModuleType

import pytest

from offtower.ops import available_instruction_sets
from tests.ops import cuda_emulation


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The CUDA kernels on an emulated thread block."""
    return cuda_emulation.build()


@pytest.fixture(params=available_instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine runs, in turn."""
    monkeypatch.setenv("OFFTOWER_CPU_ISA", request.param)
    return str(request.param)
