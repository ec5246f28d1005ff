"""One thread for every test and what it starts, unless OMP_NUM_THREADS says otherwise: the suite
itself runs on as many processes as there are cores, and small tensors gain nothing from more.
Tests of threads set their own number."""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402  (after the environment that it reads)
from hypothesis import settings  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# No test asserts a time, also not by hypothesis' deadline.
settings.register_profile("offtower", deadline=None)
settings.load_profile("offtower")
