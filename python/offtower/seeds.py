"""Randomness as a function of (seed, purpose, place), so that a resumed run repeats it."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *place: int) -> int:
    """A 63-bit seed for one purpose at one place (an epoch, a window, a batch, a fold)."""
    key = [seed, zlib.crc32(purpose.encode()), *place]
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def seed_torch(seed: int, purpose: str, *place: int) -> None:
    torch.manual_seed(derive_seed(seed, purpose, *place))
