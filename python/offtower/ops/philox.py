"""Philox-4x32-10, a counter-based random number generator (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), in plain torch.

The numbers of a draw follow from a seed, the number of its row and the number of the draw alone:
neither threads, devices nor the split of rows into batches change them.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, ...]:
    """Compute four int64 tensors of random 32-bit words.

    Args:
        counter: four words of 32 bits each, int64 tensors that broadcast.
        key: 64 bits.
    """
    c0, c1, c2, c3 = counter
    keys = [key & WORD, key >> 32 & WORD]
    for _ in range(10):
        # Products wrap to 64 bits; the shift repeats the sign, which the mask drops.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (second >> 32 & WORD) ^ c1 ^ keys[0], (first >> 32 & WORD) ^ c3 ^ keys[1]
        c1, c3 = second & WORD, first & WORD
        keys = [(k + w) & WORD for k, w in zip(keys, _WEYL, strict=True)]
    return c0, c1, c2, c3


def uniform_pairs(seed: int, stream: Tensor, draw: Tensor, purpose: int) -> tuple[Tensor, Tensor]:
    """Draw two uniform float64 numbers in [0, 1), of 53 bits each.

    Args:
        seed: 64 bits.
        stream: int64 numbers of rows.
        draw: int64 numbers of draws, below 2^32; broadcasts with `stream`.
        purpose: keeps the numbers of different uses apart.
    """
    same = torch.full_like(draw, purpose)
    words = philox((stream & WORD, stream >> 32 & WORD, draw, same), seed)

    def unit(low: Tensor, high: Tensor) -> Tensor:
        # The upper 53 of 64 bits.
        return (high * 2.0**21 + (low >> 11)).double() * 2.0**-53

    return unit(words[0], words[1]), unit(words[2], words[3])
