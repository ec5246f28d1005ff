"""Bootstrap weights as a pure function of (seed, replicate, key).

The Poisson bootstrap (Hanley and MacGibbon 2006; Chamandy et al. 2012) gives every row, or every
user, an independent weight of mean 1 and variance 1 in each replicate. Hashing a key instead of
drawing from a stream makes the weights independent of how the log is divided into shards.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), elementwise; returns a new array."""
    z = values ^ (values >> np.uint64(30))
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def poisson_weights(key: NDArray[np.int64], replicates: int, seed: int) -> NDArray[np.uint8]:
    """(n, replicates) weights, Poisson(1) to a resolution of 2**-16, mean and variance exactly 1.

    key: (n,) int64. One 64-bit hash serves four replicates.
    """
    blocks = -(-replicates // 4)
    start = np.uint64((seed * _STEP + _STEP) & _MASK)
    base = mix(np.ascontiguousarray(key).view(np.uint64) + start)
    base = mix(base + np.uint64(_STEP))
    steps = np.array([((j + 1) * _STEP) & _MASK for j in range(blocks)], dtype=np.uint64)
    bits = mix(base[:, None] + steps[None, :])
    return _TABLE[bits.view(np.uint16)][:, :replicates]


def _table() -> NDArray[np.uint8]:
    """65,536 values whose frequencies are Poisson(1)'s, corrected to mean 1 and variance 1."""
    size = 1 << 16
    count = [round(size * math.exp(-1.0) / math.factorial(k)) for k in range(9)]
    # Solve for three cells, so that the moments 0, 1 and 2 are size, size and 2 * size.
    rest = [(k, c) for k, c in enumerate(count) if k not in (0, 1, 2)]
    left = size - sum(c for _, c in rest)
    first = size - sum(k * c for k, c in rest)
    second = 2 * size - sum(k * k * c for k, c in rest)
    two, odd = divmod(second - first, 2)
    assert odd == 0
    one = first - 2 * two
    count[:3] = [left - one - two, one, two]
    return np.repeat(np.arange(9, dtype=np.uint8), count)


_TABLE = _table()
