"""Rewards of slates: examination by position, and three structures of interaction.

With z_k = z(x, a_k), examination theta_k = (k + 1)^-decay and interaction strength g:

    independent  E r_k = theta_k sigmoid(z_k)
    cascade      E r_k = theta_k sigmoid(z_k) prod_{j<k} (1 - g sigmoid(z_j))
    standard     E r_k = theta_k sigmoid(z_k - g mean_{j != k} (z_j - intercept))

`independent` is the position-based click model (Richardson et al. 2007). In `cascade` a user leaves
after a reward r with probability g r, as in the dependent click model (Guo et al. 2009), so that a
reward depends on the items above. In `standard` the other items of the slate, above and below,
compete with each item. The structures are the assumptions under which the estimators of the same
names are unbiased (Kiyohara et al. 2022, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offtower.errors import ConfigError

RewardStructure = Literal["independent", "cascade", "standard"]
RewardKind = Literal["binary", "continuous"]
Array = NDArray[np.float64]

_BETA_CONCENTRATION = 4.0


@dataclass(frozen=True)
class SlateSettings:
    """Slates of a simulated world.

    Attributes:
        size: K, items of a slate.
        structure: of the rewards.
        decay: of examination; 0 examines every position.
        interaction: strength g; in [0, 1] for `cascade`, any for `standard`, without effect for
            `independent`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    size: int
    structure: RewardStructure = "cascade"
    decay: float = 0.5
    interaction: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"a slate must have at least 1 item, but has {self.size}")
        if self.structure not in get_args(RewardStructure):
            raise ConfigError(
                f"structure must be one of {', '.join(get_args(RewardStructure))}, but is "
                f"{self.structure!r}"
            )
        if not (np.isfinite(self.decay) and self.decay >= 0.0):
            raise ConfigError(f"decay must be at least 0, but is {self.decay}")
        if not np.isfinite(self.interaction) or (
            self.structure == "cascade" and not 0.0 <= self.interaction <= 1.0
        ):
            raise ConfigError(
                f"interaction must be finite, and in [0, 1] for cascade, but is {self.interaction}"
            )

    @property
    def examination(self) -> Array:
        """(K,) theta, the probability that a position is examined."""
        theta: Array = np.power(1.0 + np.arange(self.size, dtype=np.float64), -self.decay)
        return theta

    def expected_rewards(self, logit: Array, intercept: float) -> Array:
        """Compute the expected reward of each position.

        Args:
            logit: (..., K) z of the shown items, in order.
            intercept: z of an average item.

        Returns:
            (..., K) E r_k given the slate.
        """
        attraction = self._attraction(logit, intercept)
        expected: Array = attraction * self.examination
        if self.structure == "cascade":
            stays = np.cumprod(1.0 - self.interaction * attraction, axis=-1)
            expected[..., 1:] *= stays[..., :-1]
        return expected

    def draw(
        self, logit: Array, intercept: float, kind: RewardKind, rng: np.random.Generator
    ) -> Array:
        """Draw the rewards (n, K) of slates with z `logit` (n, K).

        A user examines the first D positions, with P(D > k) = theta_k, so that the rewards of a
        round are dependent.
        """
        reward = draw_rewards(self._attraction(logit, intercept), kind, rng)
        examined = rng.random((len(logit), 1)) < self.examination
        if self.structure == "cascade":
            stays = rng.random(logit.shape) >= self.interaction * reward
            examined[:, 1:] &= np.logical_and.accumulate(stays, axis=1)[:, :-1]
        return reward * examined

    def _attraction(self, logit: Array, intercept: float) -> Array:
        """(..., K) probability of a reward at an examined position."""
        if self.structure == "standard" and self.size > 1:
            above = logit - intercept
            others = (above.sum(axis=-1, keepdims=True) - above) / (self.size - 1)
            logit = logit - self.interaction * others
        attraction: Array = 1.0 / (1.0 + np.exp(-logit))
        return attraction


def draw_rewards(mean: Array, kind: RewardKind, rng: np.random.Generator) -> Array:
    """Draw Bernoulli(mean), or Beta(4 mean, 4 (1 - mean)), as float64 of the shape of `mean`."""
    if kind == "binary":
        drawn: Array = (rng.random(mean.shape) < mean).astype(np.float64)
        return drawn
    # Beta needs positive parameters; a mean within 1e-12 of 0 or 1 is that far off.
    safe = np.clip(mean, 1e-12, 1.0 - 1e-12)
    return rng.beta(_BETA_CONCENTRATION * safe, _BETA_CONCENTRATION * (1.0 - safe))
