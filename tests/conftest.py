"""One thread for every test and what it starts, unless OMP_NUM_THREADS says otherwise: the suite
itself runs on as many processes as there are cores, and small tensors gain nothing from more.
Tests of threads set their own number."""

from __future__ import annotations

import os
from collections.abc import Iterator

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402  (after the environment that it reads)
from hypothesis import settings  # noqa: E402

from tests.lighter import without_charts, without_graphs  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# What is flushed to disk only a loss of power shows; waiting for the disk is a tenth of the suite.
# A bad descriptor still raises.
os.fsync = os.fstat  # type: ignore[assignment]

# No test asserts a time, also not by hypothesis' deadline.
settings.register_profile("offtower", deadline=None)
settings.load_profile("offtower")


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: some tests wait for timers or other processes."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def no_graphs() -> Iterator[None]:
    with without_graphs():
        yield


@pytest.fixture
def no_charts() -> Iterator[None]:
    with without_charts():
        yield
