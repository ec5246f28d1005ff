"""The mixture of a softmax with uniform draws from the eligible items, in log space.

p(a|x) = (1 - uniform) softmax(s / temperature)_a + uniform / |eligible items|
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offtower.models.item_draws import logits_at
from offtower.models.items import ItemEmbeddings
from offtower.ops import (
    DenseReward,
    FactoredReward,
    PolicyTerms,
    partial_terms,
    policy_terms,
    sample_softmax,
)
from offtower.ops.eligibility import Eligibility, ItemMask
from offtower.slates import Rest

_MAX_PROBABILITIES = 1 << 22
"""Probabilities held at a time for the entropy of a mixture."""


@dataclass(frozen=True)
class UniformMixture:
    """A softmax over items, mixed with uniform draws.

    Attributes:
        items: N of them, with the bias that belongs to `temperature`.
        temperature: of the softmax.
        uniform: share of the uniform draws, above 0.
    """

    items: ItemEmbeddings
    temperature: float
    uniform: float

    def replaced(
        self,
        drawn: Tensor,
        generator: torch.Generator,
        eligible: Eligibility | None,
    ) -> Tensor:
        """Replace each draw (B, S) by one from all eligible items, with probability `uniform`."""
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        coin = torch.rand(drawn.shape, dtype=torch.float64, **options).to(drawn.device)
        rows, count = len(drawn), self.items.embedding.shape[0]
        if eligible is None:
            other = torch.randint(count, drawn.shape, **options).to(drawn.device)
        else:
            other, _ = sample_softmax(
                self.items.embedding.new_zeros(rows, 1),
                self.items.embedding.new_zeros(count, 1),
                eligible=eligible,
                generator=generator,
                num_samples=drawn.shape[1],
            )
        return torch.where(coin < self.uniform, other, drawn)

    def entropy(
        self,
        context_embedding: Tensor,
        log_normalizer: Tensor,
        log_count: Tensor,
        eligible: Eligibility | None,
    ) -> Tensor:
        """Entropy of the mixture, in nats, summed over all items a block at a time.

        Args:
            context_embedding: (B, d).
            log_normalizer, log_count: (B,) of the softmax, and of the eligible items.

        Returns:
            (B,), of the type of log_normalizer.
        """
        rows, count = len(context_embedding), self.items.embedding.shape[0]
        shift, log_share = log_normalizer[:, None].double(), -log_count[:, None]
        total = context_embedding.new_zeros(rows, dtype=torch.float64)
        if eligible is not None:
            eligible = eligible.resolved()
        if eligible is not None and eligible.candidates is not None:
            row, item = eligible.candidates.entry_rows(), eligible.candidates.items
            logit = logits_at(context_embedding[row], self.items, item[:, None], self.temperature)
            each = entropy_terms(logit - shift[row], log_share[row], self.uniform)
            return total.index_add(0, row, each[:, 0]).to(log_normalizer.dtype)
        mask = None if eligible is None else ItemMask(eligible)
        size = max(64, _MAX_PROBABILITIES // max(1, rows) // 64 * 64)
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            score = (context_embedding @ self.items.embedding[part].T).double() / self.temperature
            if self.items.bias is not None:
                score = score + self.items.bias[part].double()
            each = entropy_terms(score - shift, log_share, self.uniform)
            if mask is not None:
                each = each.masked_fill(mask.ineligible(start, part.stop, rows), 0.0)
            total = total + each.sum(1)
        return total.to(log_normalizer.dtype)

    def rest(
        self,
        softmax: Rest,
        log_count: Tensor,
        without: Eligibility,
        reward_model: DenseReward | FactoredReward | None,
    ) -> Rest:
        """The items that a round does not show, under the mixture.

        Args:
            softmax: those items under the softmax.
            log_count: (B,) float64 of the eligible items.
            without: the eligible items that are not shown.
            reward_model: q, for the mean of the rest.
        """
        rows, uniform = len(log_count), self.uniform
        embedding = self.items.embedding
        over_rest = partial_terms(
            embedding.new_zeros(rows, 1),
            embedding.new_zeros(embedding.shape[0], 1),
            torch.full((rows,), -1, dtype=torch.int64, device=log_count.device),
            reward_model=reward_model,
            eligible=without,
        ).sums
        log_share = over_rest.log_normalizer.double() - log_count
        mixed, mean = log_mixture(softmax.log_mass, log_share, uniform), softmax.expected_reward
        if mean is not None and over_rest.expected_reward is not None:
            drawn = (1.0 - uniform) * torch.where(torch.isneginf(softmax.log_mass), 0.0, mean)
            spread = uniform * log_share.exp() * over_rest.expected_reward.double()
            mean = (drawn * softmax.log_mass.exp() + spread) / mixed.exp()
        return Rest(mixed, mean)


def uniform_terms(
    context_embedding: Tensor,
    items: ItemEmbeddings,
    action: Tensor,
    reward_model: DenseReward | FactoredReward | None,
    eligible: Eligibility | None = None,
) -> PolicyTerms:
    """Terms of the policy that shows every eligible item with the same probability.

    A reward model takes a pass with zero logits.
    """
    rows, count = len(context_embedding), items.embedding.shape[0]
    if reward_model is not None:
        return policy_terms(
            context_embedding.new_zeros(rows, 1),
            items.embedding.new_zeros(count, 1),
            action,
            reward_model=reward_model,
            eligible=eligible,
        )
    log_count = context_embedding.new_full((rows,), math.log(count))
    log_prob = -log_count
    if eligible is not None:
        log_count = eligible.count(count).double().log().to(log_count.dtype)
        row = torch.arange(rows, dtype=torch.int64, device=action.device)
        log_prob = (-log_count).masked_fill(~eligible.contains(row, action), -math.inf)
    return PolicyTerms(log_prob, log_count, None, None, None)


def mix_uniform(terms: PolicyTerms, over_all: PolicyTerms, uniform: float) -> PolicyTerms:
    """Terms of the mixture of a softmax and of uniform draws, without its entropy.

    over_all: `uniform_terms`. uniform: their share, above 0.
    """
    log_prob = log_mixture(terms.log_prob.double(), over_all.log_prob.double(), uniform)
    expected = terms.expected_reward
    if expected is not None:
        assert over_all.expected_reward is not None
        expected = (1.0 - uniform) * expected + uniform * over_all.expected_reward
    return replace(
        terms,
        log_prob=log_prob.to(terms.log_prob.dtype),
        expected_reward=expected,
        entropy=None,
    )


def log_mixture(log_softmax: Tensor, log_uniform: Tensor, uniform: float) -> Tensor:
    """log((1 - uniform) exp(log_softmax) + uniform exp(log_uniform)), where either may be -inf."""
    rest = math.log1p(-uniform) if uniform < 1.0 else -math.inf
    return torch.logaddexp(log_softmax + rest, log_uniform + math.log(uniform))


def entropy_terms(log_softmax: Tensor, log_uniform: Tensor, uniform: float) -> Tensor:
    """-p log p of the mixture."""
    log_prob = log_mixture(log_softmax, log_uniform, uniform)
    return -log_prob.exp() * log_prob
