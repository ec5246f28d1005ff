"""A small world of slates, enumerated: 8 items, 3 positions, every probability known."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

ITEMS, POSITIONS = 8, 3
SLATES = np.array(list(permutations(range(ITEMS), POSITIONS)))
"""(336, 3) all ordered slates."""

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def conditionals(probability: Array) -> Array:
    """(..., 336, 3) pi(a_k|x, a_<k) of every slate from (..., 8) single draws, by subtraction of
    the shown items in float64 with the other items summed anew."""
    out = np.empty((*probability.shape[:-1], *SLATES.shape))
    for s, slate in enumerate(SLATES):
        for k, item in enumerate(slate):
            left = [a for a in range(ITEMS) if a not in slate[:k]]
            out[..., s, k] = probability[..., item] / probability[..., left].sum(axis=-1)
    return out


@dataclass(frozen=True)
class SlateWorld:
    """Contexts with equal probability; expected rewards of the cascade kind.

    logging, target: (X, 8) single-draw distributions. mean: (X, 336, 3) expected reward of each
    position given the slate; with `cascade` it depends on the items above and the item itself.
    """

    logging: Array
    target: Array
    mean: Array

    @classmethod
    def make(
        cls, seed: int, contexts: int = 4, *, beyond: float = 0.0, distance: float = 1.0
    ) -> SlateWorld:
        """beyond: effect of the item below on a position's reward, which breaks the cascade.
        distance: of the target from the logging policy, 0 for the same."""
        rng = np.random.default_rng(seed)
        logging = softmax(rng.normal(size=(contexts, ITEMS)))
        target = softmax(1.5 * rng.normal(size=(contexts, ITEMS)))
        appeal = rng.uniform(0.1, 0.5, size=(contexts, ITEMS))
        synergy = rng.uniform(-0.05, 0.15, size=(ITEMS, ITEMS))
        mean = np.empty((contexts, *SLATES.shape))
        for s, slate in enumerate(SLATES):
            for k, item in enumerate(slate):
                mean[:, s, k] = appeal[:, item] / (1.0 + 0.3 * k)
                if k:
                    mean[:, s, k] += synergy[slate[k - 1], item]
                if k + 1 < POSITIONS:
                    mean[:, s, k] += beyond * synergy[slate[k + 1], item]
        target = logging ** (1.0 - distance) * target**distance
        target /= target.sum(axis=-1, keepdims=True)
        return cls(logging, target, mean.clip(0.01, 0.99))

    @property
    def contexts(self) -> int:
        return self.logging.shape[0]

    def slate_probability(self, probability: Array) -> Array:
        """(X, 336)."""
        return conditionals(probability).prod(axis=-1)

    def value(self, probability: Array) -> float:
        """Mean over rounds of the sum over positions, for a Plackett-Luce policy."""
        weights = self.slate_probability(probability) / self.contexts
        return float((weights * self.mean.sum(axis=-1)).sum())

    def draw(self, rounds: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
        """Contexts (R,), slate numbers (R,) under the logging policy, rewards (R, 3)."""
        x = rng.integers(self.contexts, size=rounds)
        cumulative = self.slate_probability(self.logging).cumsum(axis=-1)
        cumulative[:, -1] = 1.0
        uniform, slate = rng.random(rounds), np.empty(rounds, dtype=np.int64)
        for context in range(self.contexts):
            own = x == context
            slate[own] = np.searchsorted(cumulative[context], uniform[own])
        reward = (rng.random((rounds, POSITIONS)) < self.mean[x, slate]).astype(np.float64)
        return x, slate, reward
