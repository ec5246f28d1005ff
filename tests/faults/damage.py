"""Faults of files: a flipped bit, or an end that is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

TRUNCATED_SHARE = 0.25


@dataclass(frozen=True)
class Fault:
    """A fault of one file.

    Attributes:
        kind: what happens to it.
        position: number of the bit that is flipped, or the bytes that are left.
    """

    kind: Literal["flip", "truncate"]
    position: int

    @classmethod
    def draw(cls, rng: np.random.Generator, size: int) -> Fault:
        """A random fault of a file of `size` bytes, at least 1."""
        if rng.random() < TRUNCATED_SHARE:
            return cls("truncate", int(rng.integers(size)))
        return cls("flip", int(rng.integers(8 * size)))

    def apply(self, content: bytes) -> bytes:
        """The content with this fault."""
        if self.kind == "truncate":
            return content[: self.position]
        damaged = bytearray(content)
        damaged[self.position // 8] ^= 1 << self.position % 8
        return bytes(damaged)
