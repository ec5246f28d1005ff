"""Logging policies of a simulated world: exact draws with exact probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from offtower import ops
from offtower.data.simulate.large_draws import draw_items
from offtower.data.simulate.served import ServedDistribution
from offtower.errors import ConfigError

LoggingKind = Literal["contextual", "popularity"]


@dataclass(frozen=True)
class LoggingPolicy:
    """pi_0(a|x) = (1 - epsilon) softmax_a(beta z) + epsilon / N.

    Attributes:
        kind: "contextual" uses z(x, a) of the rewards; "popularity" the item's part alone, so that
            a draw costs O(log N) instead of O(N).
        beta: inverse temperature; negative values prefer bad items.
        epsilon: share of uniform draws, in [0, 1].

    Raises:
        ConfigError: epsilon is outside [0, 1], or the kind is unknown.
    """

    kind: LoggingKind = "contextual"
    beta: float = 1.0
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("contextual", "popularity"):
            raise ConfigError(f"logging must be 'contextual' or 'popularity', but is {self.kind!r}")
        if not 0.0 <= self.epsilon <= 1.0:
            raise ConfigError(f"epsilon must lie in [0, 1], but is {self.epsilon}")

    @property
    def served(self) -> ServedDistribution:
        """How logits beta z become probabilities, for arrays over all items."""
        return ServedDistribution(uniform=self.epsilon)

    def context_factor(self, latent: Tensor) -> Tensor:
        """Return (B, d) context factors of the softmax's logits from z-factors `latent` (B, l)."""
        return self.beta * latent if self.kind == "contextual" else latent.new_zeros(len(latent), 1)

    def item_factor(self, latent: Tensor) -> Tensor:
        """Return (N, d) item factors of the softmax's logits from z-factors `latent` (N, l)."""
        if self.kind == "contextual":
            return latent
        return latent.new_zeros(len(latent), 1)

    def draw(
        self,
        context_latent: Tensor,
        item_latent: Tensor,
        item_logit: Tensor,
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Draw an item for each context.

        Args:
            context_latent: (B, l) float64.
            item_latent: (N, l) float64.
            item_logit: (N,) float64.
            rng: source of the draws.

        Returns:
            item numbers (B,) int64 and their probabilities pi_0 (B,) float64.
        """
        count, n_items = len(context_latent), len(item_logit)
        uniform = torch.from_numpy(rng.random(count) < self.epsilon)
        other = torch.from_numpy(rng.integers(n_items, size=count))
        if self.kind == "popularity":
            probability = torch.softmax(self.beta * item_logit, dim=0)
            ends = torch.cumsum(probability, dim=0)
            point = torch.from_numpy(rng.random(count)) * ends[-1]
            drawn = torch.searchsorted(ends, point, right=True).clamp_(max=n_items - 1)
            action = torch.where(uniform, other, drawn)
            softmax = probability[action]
        else:

            def logit(item: Tensor) -> Tensor:
                return (context_latent * item_latent[item]).sum(dim=1) + item_logit[item]

            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            item, log_normalizer = draw_items(
                self.beta * context_latent,
                item_latent,
                self.beta * item_logit,
                generator=generator,
            )
            action = torch.where(uniform, other, item[:, 0])
            softmax = torch.exp(self.beta * logit(action) - log_normalizer)
        return action, (1.0 - self.epsilon) * softmax + self.epsilon / n_items

    def probability(
        self, context_latent: Tensor, item_latent: Tensor, item_logit: Tensor, action: Tensor
    ) -> Tensor:
        """Compute (B,) float64 pi_0(a|x) of the items `action` (B,) at O(N) a row.

        The other arguments are those of `draw`.
        """
        if self.kind == "popularity":
            softmax = torch.softmax(self.beta * item_logit, dim=0)[action]
        else:
            terms = ops.policy_terms(
                self.beta * context_latent, item_latent, action, item_bias=self.beta * item_logit
            )
            softmax = terms.log_prob.exp()
        return (1.0 - self.epsilon) * softmax + self.epsilon / len(item_logit)
