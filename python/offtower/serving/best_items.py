"""The softmax over the best items of a row, and the item at a position of the best ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offtower.models.item_draws import rewards_at
from offtower.ops import DenseReward, FactoredReward, PolicyTerms
from offtower.ops.categorical import draw_categorical
from offtower.serving.mixture import entropy_terms
from offtower.slates import Rest


@dataclass(frozen=True)
class BestItems:
    """The n best items of B rows; rows with fewer are padded with scores of -inf.

    score, item: (B, n), best first.
    """

    score: Tensor
    item: Tensor

    @property
    def log_normalizer(self) -> Tensor:
        """(B,)."""
        return torch.logsumexp(self.score.double(), 1).to(self.score.dtype)

    @property
    def log_prob(self) -> Tensor:
        """(B, n) float64."""
        return torch.log_softmax(self.score.double(), 1)

    def terms(
        self, action: Tensor, reward_model: DenseReward | FactoredReward | None
    ) -> PolicyTerms:
        """Terms of the softmax over these items."""
        dtype, log_prob = self.score.dtype, self.log_prob
        probability = log_prob.exp()
        own = log_prob.masked_fill(self.item != action[:, None], -math.inf).amax(1)
        expected = action_reward = None
        if reward_model is not None:
            action_reward = rewards_at(reward_model, action[:, None])[:, 0]
            reward = rewards_at(reward_model, self.item.clamp_min(0)).double()
            expected = (probability * reward).sum(1).to(dtype)
        entropy = -torch.special.xlogy(probability, probability).sum(1).to(dtype)
        return PolicyTerms(own.to(dtype), self.log_normalizer, expected, action_reward, entropy)

    def mixture_entropy(self, uniform: float, log_count: Tensor) -> Tensor:
        """(B,) entropy of the mixture with uniform draws over exp(log_count) (B,) items."""
        log_count = log_count.double()
        found = torch.isfinite(self.score)
        entropy = entropy_terms(self.log_prob, -log_count[:, None], uniform)
        inside = entropy.masked_fill(~found, 0.0).sum(1)
        each = math.log(uniform) - log_count
        others = (log_count.exp() - found.sum(1)).clamp_min(0.0)
        return (inside - others * each.exp() * each).to(self.score.dtype)

    def draw(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """(B, S) items drawn from the softmax over these, with replacement."""
        drawn = draw_categorical(self.log_prob, num_samples, generator)
        return self.item.gather(1, drawn)

    def contains(self, item: Tensor) -> Tensor:
        """(B, S) whether these hold the items (B, S)."""
        ordered = self.item.sort(1).values
        index = torch.searchsorted(ordered, item.contiguous()).clamp_max(ordered.shape[1] - 1)
        return ordered.gather(1, index) == item

    def rest(self, shown: Tensor, reward_model: DenseReward | FactoredReward | None) -> Rest:
        """Those of these items that a round, (B, K) with -1 for none, does not show."""
        hidden = (self.item[:, :, None] == shown[:, None, :]).any(2)
        log_prob = self.log_prob.masked_fill(hidden, -math.inf)
        log_mass, mean = torch.logsumexp(log_prob, 1), None
        if reward_model is not None:
            reward = rewards_at(reward_model, self.item.clamp_min(0)).double()
            mean = (log_prob.exp() * reward).sum(1) / log_mass.exp()
        return Rest(log_mass, mean)

    def at(self, position: Tensor | None) -> ShownItem:
        """The item at the positions (B,) of the rows; None is 0 for each."""
        if position is None:
            position = self.item.new_zeros(len(self.item))
        last = self.item.shape[1] - 1
        at = position.clamp(0, last)[:, None]
        exists = (position <= last) & torch.isfinite(self.score.gather(1, at)[:, 0])
        return ShownItem(self.item.gather(1, at)[:, 0].clamp_min(0), exists)


@dataclass(frozen=True)
class ShownItem:
    """The item that a deterministic policy shows in each of B rows.

    Attributes:
        item: (B,). exists: (B,) whether there is one; it is 0 elsewhere.
    """

    item: Tensor
    exists: Tensor

    def log_prob_at(self, item: Tensor) -> Tensor:
        """(B, S) float64 log-probabilities, 0 or -inf, of the items (B, S)."""
        event = (item == self.item[:, None]) & self.exists[:, None]
        certain = torch.zeros(event.shape, dtype=torch.float64, device=event.device)
        return certain.masked_fill(~event, -math.inf)

    def terms(
        self,
        action: Tensor,
        reward_model: DenseReward | FactoredReward | None,
        dtype: torch.dtype,
    ) -> PolicyTerms:
        """Terms of the policy that shows these items."""
        log_prob = self.log_prob_at(action[:, None])[:, 0].to(dtype)
        expected = action_reward = None
        if reward_model is not None:
            action_reward = rewards_at(reward_model, action[:, None])[:, 0]
            expected = rewards_at(reward_model, self.item[:, None])[:, 0] * self.exists
        zero = torch.zeros_like(log_prob)
        return PolicyTerms(log_prob, zero, expected, action_reward, zero)
