"""Bootstrap weights as a pure function of (seed, replicate, key).

The Poisson bootstrap (Hanley and MacGibbon 2006; Chamandy et al. 2012) gives every row, or every
user, an independent weight of mean 1 and variance 1 in each replicate. Hashing a key instead of
drawing from a stream makes the weights independent of how the log is divided into shards.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from offtower.data.columns import SPLITMIX_STEP, splitmix64

_MASK = (1 << 64) - 1


def poisson_weights(key: NDArray[np.int64], replicates: int, seed: int) -> NDArray[np.uint8]:
    """(n, replicates) weights, Poisson(1) to a resolution of 2**-16, mean and variance exactly 1.

    key: (n,) int64. One 64-bit hash serves four replicates.
    """
    blocks = -(-replicates // 4)
    start = np.uint64((seed * SPLITMIX_STEP) & _MASK)
    base = splitmix64(splitmix64(np.ascontiguousarray(key).view(np.uint64) + start))
    steps = np.array([(j * SPLITMIX_STEP) & _MASK for j in range(blocks)], dtype=np.uint64)
    bits = splitmix64(base[:, None] + steps[None, :])
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
