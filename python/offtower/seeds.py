"""Seeds as a function of (seed, purpose, key), so that a resumed run repeats its draws."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *key: int) -> int:
    """Return a 63-bit seed for a purpose and a key, such as (epoch, window, batch) or a fold."""
    entropy = [seed, zlib.crc32(purpose.encode()), *key]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def seed_torch(seed: int, purpose: str, *key: int) -> None:
    """Seed torch's global generators.

    Without a GPU that is the one of the CPU: `torch.manual_seed` also formats a stack trace for
    each kind of accelerator, which takes longer than a step of a small model.
    """
    value = derive_seed(seed, purpose, *key)
    if _has_accelerator():
        torch.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
