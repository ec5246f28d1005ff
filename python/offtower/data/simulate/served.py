"""The served distribution in float64, by an array over all items: the truth that serving, draws
and evaluation are tested against.

    pi_served = (1 - uniform) softmax(s / temperature) + uniform / |eligible|
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offtower.errors import ConfigError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ServedDistribution:
    """How scores become the probabilities of a single draw.

    Attributes:
        temperature: divides the scores.
        uniform: share of uniform draws over all eligible items.
        top: the softmax is over the `top` best eligible items only; None for all.
    """

    temperature: float = 1.0
    uniform: float = 0.0
    top: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0.0 or not 0.0 <= self.uniform <= 1.0:
            raise ConfigError(
                "temperature must be positive and uniform in [0, 1], but they are "
                f"{self.temperature} and {self.uniform}"
            )

    def log_prob(self, score: Array, eligible: NDArray[np.bool_] | None = None) -> Array:
        """Compute the log-probabilities of a single draw.

        Args:
            score: (B, N) float64.
            eligible: (B, N); None where every item is. Each row needs one.

        Returns:
            (B, N); -inf for an item that cannot be drawn.
        """
        if eligible is None:
            eligible = np.ones(score.shape, dtype=bool)
        logit = np.where(eligible, score / self.temperature, -np.inf)
        if self.top is not None and self.top < score.shape[1]:
            # Ties go to the lowest item number.
            order = np.argsort(-logit, axis=1, kind="stable")
            np.put_along_axis(logit, order[:, self.top :], -np.inf, axis=1)
        logit -= logit.max(axis=1, keepdims=True)
        softmax: Array = logit - np.log(np.exp(logit).sum(axis=1, keepdims=True))
        if self.uniform == 0.0:
            return softmax
        with np.errstate(divide="ignore"):
            share = np.log(self.uniform) - np.log(eligible.sum(axis=1, keepdims=True))
            uniform = np.where(eligible, share, -np.inf)
            mixed: Array = np.logaddexp(np.log1p(-self.uniform) + softmax, uniform)
        return mixed
