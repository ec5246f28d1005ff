"""Exact values of policies in a simulated world: sums over all items, means over drawn contexts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower import ops
from offtower.data.simulate.eligible_sets import EligibleSets
from offtower.data.simulate.logging_policy import LoggingPolicy
from offtower.data.simulate.plackett_luce import tile_rows
from offtower.data.simulate.served import ServedDistribution
from offtower.errors import ConfigError

EmbedContexts = Callable[[pa.Table], Tensor]
"""Maps the context columns of B rows to (B, d) embeddings."""


SingleDraw = Callable[[pa.Table], NDArray[np.float64]]
"""Maps the context columns of B rows to (B, N) log-probabilities of a single draw."""


class PolicyValue(NamedTuple):
    """Mean expected reward over drawn contexts, and its Monte-Carlo standard error."""

    value: float
    std_error: float


class FixedItemValue(NamedTuple):
    """The best item to show in every context, and its value."""

    item: int
    value: float
    std_error: float


class PolicyValues(ABC):
    """Values of policies, from the factors of z(x, a).

    Attributes:
        n_items: N.
        item_latent: (N, latent_dim) float64, z's item factor.
        item_logit: (N,) float64, z's item part.
        logging_policy: that of the world's logs.
        eligible: which items may be shown; None where every item may.
    """

    n_items: int
    item_latent: Tensor
    item_logit: Tensor
    logging_policy: LoggingPolicy
    eligible: EligibleSets | None

    @abstractmethod
    def contexts(self, n: int, seed: int = 0) -> pa.Table:
        """Draw n new contexts: a table of the context columns."""

    @abstractmethod
    def context_latent(self, contexts: pa.Table) -> Tensor:
        """Return z's context factor, (B, latent_dim) float64, scale included."""

    @abstractmethod
    def eligibility(self, contexts: pa.Table) -> ops.Eligibility | None:
        """Return the eligible items of these contexts for the operators; None where all are."""

    def reward_model(self, contexts: pa.Table) -> ops.FactoredReward:
        """Return q of these contexts and all items."""
        return ops.FactoredReward(
            self.context_latent(contexts), self.item_latent, self.item_logit, link="sigmoid"
        )

    def expected_reward(self, contexts: pa.Table, action: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return (B,) q(x_i, a_i) for item indices `action`."""
        logit = self._logit(self.context_latent(contexts), torch.from_numpy(action))
        expected: NDArray[np.float64] = torch.sigmoid(logit).numpy()
        return expected

    def policy_rewards(
        self,
        contexts: pa.Table,
        embed_contexts: EmbedContexts,
        item_embedding: Tensor,
        *,
        temperature: float = 1.0,
        item_bias: Tensor | None = None,
        chunk_rows: int = 1024,
    ) -> NDArray[np.float64]:
        """Compute the expected reward of a two-tower softmax policy in each context, in float64.

        Args:
            contexts: (n rows) context columns.
            embed_contexts: context columns of B rows -> (B, d).
            item_embedding: (N, d).
            temperature, item_bias: as in `ops.policy_terms`.
            chunk_rows: contexts scored at a time.

        Returns:
            (n,) sum_a pi(a|x_i) q(x_i, a).
        """
        items = item_embedding.detach().double()
        bias = None if item_bias is None else item_bias.detach().double()
        if self.eligible is not None:
            single_draw = self.two_tower(
                embed_contexts, items, temperature=temperature, item_bias=bias
            )
            return self._rewards_among_eligible(contexts, single_draw)
        parts = []
        with torch.no_grad():
            for start in range(0, contexts.num_rows, chunk_rows):
                chunk = contexts.slice(start, chunk_rows)
                terms = ops.policy_terms(
                    embed_contexts(chunk).detach().double(),
                    items,
                    torch.zeros(chunk.num_rows, dtype=torch.int64, device="cpu"),
                    temperature=temperature,
                    item_bias=bias,
                    reward_model=self.reward_model(chunk),
                )
                assert terms.expected_reward is not None
                parts.append(terms.expected_reward.numpy())
        return np.concatenate(parts) if parts else np.zeros(0)

    def two_tower(
        self,
        embed_contexts: EmbedContexts,
        item_embedding: Tensor,
        *,
        temperature: float = 1.0,
        item_bias: Tensor | None = None,
        served: ServedDistribution = ServedDistribution(),
    ) -> SingleDraw:
        """Return the single-draw log-probabilities of a served two-tower policy, in float64.

        The other arguments are those of `policy_rewards`. Items that are not eligible have none.
        """
        items = item_embedding.detach().double()
        bias = 0.0 if item_bias is None else item_bias.detach().double()

        def log_prob(contexts: pa.Table) -> NDArray[np.float64]:
            with torch.no_grad():
                embedding = embed_contexts(contexts).detach().double()
                score = (embedding @ items.T / temperature + bias).numpy()
            eligible = None if self.eligible is None else self.eligible.mask(contexts)
            return served.log_prob(score, eligible)

        return log_prob

    def true_value(
        self,
        embed_contexts: EmbedContexts,
        item_embedding: Tensor,
        *,
        temperature: float = 1.0,
        item_bias: Tensor | None = None,
        n_contexts: int = 10_000,
        seed: int = 0,
    ) -> PolicyValue:
        """Estimate the value of a two-tower softmax policy over new contexts.

        The sum over items is exact; only the contexts are sampled.
        """
        return _mean(
            self.policy_rewards(
                self.contexts(n_contexts, seed),
                embed_contexts,
                item_embedding,
                temperature=temperature,
                item_bias=item_bias,
            )
        )

    def logging_rewards(self, contexts: pa.Table) -> NDArray[np.float64]:
        """Compute (n,) expected rewards of the logging policy in each context."""
        policy = self.logging_policy
        softmax = self.policy_rewards(
            contexts,
            lambda chunk: policy.context_factor(self.context_latent(chunk)),
            policy.item_factor(self.item_latent),
            item_bias=policy.beta * self.item_logit,
        )
        return (1.0 - policy.epsilon) * softmax + policy.epsilon * self.uniform_rewards(contexts)

    def uniform_rewards(self, contexts: pa.Table) -> NDArray[np.float64]:
        """Compute (n,) means of q over all items in each context."""
        item = torch.zeros(self.n_items, 1, dtype=torch.float64, device="cpu")
        return self.policy_rewards(contexts, lambda chunk: item.new_zeros(len(chunk), 1), item)

    def best_rewards(self, contexts: pa.Table, chunk_rows: int = 1024) -> NDArray[np.float64]:
        """Compute (n,) expected rewards of the best item in each context."""
        if self.eligible is not None:
            first = ServedDistribution(top=1)
            best = self.two_tower(
                self.context_latent, self.item_latent, item_bias=self.item_logit, served=first
            )
            return self._rewards_among_eligible(contexts, best)
        parts = []
        for start in range(0, contexts.num_rows, chunk_rows):
            latent = self.context_latent(contexts.slice(start, chunk_rows))
            score, _ = ops.top_k(latent, self.item_latent, 1, item_bias=self.item_logit)
            parts.append(torch.sigmoid(score[:, 0]).numpy())
        return np.concatenate(parts)

    def value_of_logging_policy(self, n_contexts: int = 10_000, seed: int = 0) -> PolicyValue:
        """Estimate the value of the logging policy over new contexts."""
        return _mean(self.logging_rewards(self.contexts(n_contexts, seed)))

    def value_of_uniform_policy(self, n_contexts: int = 10_000, seed: int = 0) -> PolicyValue:
        """Estimate the value of the uniform policy over new contexts."""
        return _mean(self.uniform_rewards(self.contexts(n_contexts, seed)))

    def value_of_best_policy(self, n_contexts: int = 10_000, seed: int = 0) -> PolicyValue:
        """Estimate the value of the best item in each context, the upper bound of all policies."""
        return _mean(self.best_rewards(self.contexts(n_contexts, seed)))

    def best_fixed_item(self, n_contexts: int = 2_000, seed: int = 0) -> FixedItemValue:
        """Find the item with the highest mean reward; its value is from separate contexts.

        Raises:
            ConfigError: not every item may be shown in every context.
        """
        if self.eligible is not None:
            raise ConfigError("no item is eligible in every context; compare with another policy")
        latent = self.context_latent(self.contexts(n_contexts, seed)).float()
        items, logit = self.item_latent.float(), self.item_logit.float()
        total = torch.zeros(self.n_items, dtype=torch.float64, device="cpu")
        for first in range(0, n_contexts, 256):
            for start in range(0, self.n_items, 16_384):
                tile = slice(start, start + 16_384)
                rewards = torch.sigmoid(latent[first : first + 256] @ items[tile].T + logit[tile])
                total[tile] += rewards.sum(dim=0, dtype=torch.float64)
        item = int(total.argmax())
        fresh = self.contexts(n_contexts, seed + 1)
        rewards_of_item = self.expected_reward(fresh, np.full(n_contexts, item))
        return FixedItemValue(item, *_mean(rewards_of_item))

    def _rewards_among_eligible(
        self, contexts: pa.Table, single_draw: SingleDraw
    ) -> NDArray[np.float64]:
        """(n,) sum_a pi(a|x_i) q(x_i, a), by arrays over all items."""
        rows, parts = tile_rows(self.n_items), [np.zeros(0)]
        for start in range(0, contexts.num_rows, rows):
            chunk = contexts.slice(start, rows)
            logit = self.context_latent(chunk) @ self.item_latent.T + self.item_logit
            reward = torch.sigmoid(logit).numpy()
            parts.append((np.exp(single_draw(chunk)) * reward).sum(axis=1))
        return np.concatenate(parts)

    def _logit(self, latent: Tensor, action: Tensor) -> Tensor:
        return (latent * self.item_latent[action]).sum(dim=1) + self.item_logit[action]


def _mean(rewards: NDArray[np.float64]) -> PolicyValue:
    spread = rewards.std(ddof=1) if rewards.size > 1 else np.nan
    return PolicyValue(float(rewards.mean()), float(spread / np.sqrt(rewards.size)))
