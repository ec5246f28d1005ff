"""How an A/B test assigns units to arms, and what that makes of their rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln

from offtower.errors import ConfigError
from offtower.evaluation.intervals.smoothing_bound import check_range

Array = NDArray[np.float64]

MISMATCH = 1e-4
"""Probability with which a correct share is called a mismatch, over all looks."""


@dataclass(frozen=True)
class Assignment:
    """Independent assignment of each unit (request or user) to the new policy or the current one.

    Attributes:
        share: probability of the new policy.
        reward_range: least and largest possible reward of a unit.
    """

    share: float
    reward_range: tuple[float, float]

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ConfigError(
                f"the share of the new policy must lie between 0 and 1, got {self.share:g}"
            )
        check_range(self.reward_range)

    @property
    def width(self) -> float:
        """Of the range of rewards."""
        return self.reward_range[1] - self.reward_range[0]

    def reach(self, center: Array, sign: float) -> Array:
        """How far below 0 a unit's term, or with sign -1 its negative, can be at most.

        Args:
            center: m of the unit, as for `terms`.
        """
        least, most = self.reward_range
        down, up = (center - least, most - center)[:: 1 if sign > 0 else -1]
        return np.asarray(np.maximum(down / self.share, up / (1.0 - self.share)))

    def terms(self, reward: Array, new: NDArray[np.bool_], center: Array) -> Array:
        """Unbiased terms of the difference V(new) - V(current).

        (r - m) (1[new] / p - 1[current] / (1 - p)) has mean V(new) - V(current) for every m that
        does not depend on the unit itself; with m near the mean reward its variance is that of the
        difference of two means, var r / (p (1 - p)).

        Args:
            reward, new: (..., n) of the units. center: (..., n) m.
        """
        factor = np.where(new, 1.0 / self.share, -1.0 / (1.0 - self.share))
        return np.asarray((reward - center) * factor, dtype=np.float64)

    def mismatch(self, new: int, current: int) -> bool:
        """Whether the numbers of units contradict the share, at any number of looks.

        The likelihood ratio of a uniform mixture of shares to the stated one is a martingale under
        it (Johari et al. 2017; Lindon and Malek 2022, "Anytime-valid inference for multinomial
        count data").
        """
        mixture = float(betaln(1 + new, 1 + current))
        stated = new * math.log(self.share) + current * math.log1p(-self.share)
        return mixture - stated >= math.log(1.0 / MISMATCH)
