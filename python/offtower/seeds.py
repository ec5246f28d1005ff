"""Seeds as a function of (seed, purpose, key), so that a resumed run repeats its draws."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *key: int) -> int:
    """Return a 63-bit seed for a purpose and a key, such as (epoch, window, batch) or a fold."""
    entropy = [seed, zlib.crc32(purpose.encode()), *key]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def seed_torch(seed: int, purpose: str, *key: int) -> None:
    """Seed torch's global generators."""
    torch.manual_seed(derive_seed(seed, purpose, *key))
