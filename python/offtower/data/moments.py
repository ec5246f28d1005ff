"""Mergeable moments of a column, and what a quarantine does to the mean reward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_HEAVY = 0.1
"""Share of a sum in one value, above which its standard error is unreliable."""
_NOISY = 0.25
"""Largest informative ratio of a standard error to the expected number."""
_BY_CHANCE = 3.0
"""Standard errors by which leaving out random rows moves a mean at most."""
_SMALL = 0.01
"""Relative change of the mean reward that is ignored."""


@dataclass(frozen=True)
class Moments:
    """Count, mean, sum of squared deviations, largest and smallest value."""

    count: int = 0
    mean: float = 0.0
    square: float = 0.0
    largest: float = -math.inf
    smallest: float = math.inf

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Moments:
        if values.size == 0:
            return cls()
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(values.mean())
            square = float(np.square(values - mean).sum())
        return cls(
            values.size,
            mean,
            square,
            float(values.max()),
            float(values.min()),
        )

    def merge(self, other: Moments) -> Moments:
        """Merge (Chan, Golub and LeVeque 1979)."""
        if not other.count or not self.count:
            return self if self.count else other
        count = self.count + other.count
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * other.count / count,
            self.square + other.square + shift * shift * self.count * other.count / count,
            max(self.largest, other.largest),
            min(self.smallest, other.smallest),
        )

    @property
    def std_error(self) -> float:
        if self.count < 2:
            return math.inf
        return math.sqrt(self.square / (self.count - 1) / self.count)

    def too_noisy(self, expected: float) -> bool:
        """Whether the standard error is large against `expected`, or unreliable because one value
        dominates the mean."""
        return not self.std_error <= _NOISY * expected or self.dominated

    @property
    def dominated(self) -> bool:
        """Whether one value makes up so much of the sum that its standard error is unreliable."""
        return self.largest > _HEAVY * self.count * abs(self.mean)


@dataclass(frozen=True)
class QuarantineEffect:
    """Rewards of all rows with a readable reward, and of the good rows among them."""

    every: Moments = Moments()
    good: Moments = Moments()

    def __add__(self, other: QuarantineEffect) -> QuarantineEffect:
        return QuarantineEffect(self.every.merge(other.every), self.good.merge(other.good))

    @property
    def moves_mean(self) -> bool:
        """Whether leaving out the bad rows moves the mean by more than 1 % and more than chance.

        A random choice of b of n rows moves it by a standard error of s sqrt(b / (n (n - b))), s
        the standard deviation of all rows; 3 of them are more than chance.
        """
        n, left = self.every.count, self.good.count
        if left in (0, n):
            return left == 0 and n > 0
        shift = abs(self.good.mean - self.every.mean)
        deviation = math.sqrt(self.every.square / n)
        error = deviation * math.sqrt((n - left) / (n * left))
        return shift > max(_BY_CHANCE * error, _SMALL * abs(self.every.mean))
