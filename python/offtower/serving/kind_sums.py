"""Sums of a policy over the new items and over the others, and their factors under limits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtower.config import NewItemsConfig
from offtower.models.item_draws import reward_of_rows
from offtower.models.items import ItemEmbeddings
from offtower.ops.eligibility import Eligibility
from offtower.ops.types import RewardTerms


@dataclass(frozen=True)
class ContextRows:
    """B rows, and what the policy without limits is summed over.

    log_normalizer: (B,) of the rows. reward: a model q; None for none.
    """

    embedding: Tensor
    items: ItemEmbeddings
    log_normalizer: Tensor
    eligible: Eligibility | None
    reward: RewardTerms | None = None

    def take(self, row: Tensor) -> ContextRows:
        """Some of the rows, (n,) int64."""
        return ContextRows(
            self.embedding[row],
            self.items,
            self.log_normalizer[row],
            None if self.eligible is None else self.eligible.take(row),
            None if self.reward is None else reward_of_rows(self.reward, row),
        )


@dataclass(frozen=True)
class ItemSums:
    """Sums over items of the policy without limits, by row, in float64.

    log_mass: (B,) log of the sum of p. reward, entropy: (B,) sums of p q and of -p log p; zeros
    where they are not wanted.
    """

    log_mass: Tensor
    reward: Tensor
    entropy: Tensor

    def scaled(self, log_factor: Tensor) -> ItemSums:
        """The sums with p times (B,) factors."""
        factor, mass = log_factor.exp(), self.log_mass.exp()
        entropy = factor * (self.entropy - torch.where(mass > 0.0, mass * log_factor, 0.0))
        return ItemSums(self.log_mass + log_factor, factor * self.reward, entropy)

    def without(self, part: ItemSums) -> ItemSums:
        """The sums over the items that are not among those of `part`."""
        mass = (self.log_mass.exp() - part.log_mass.exp()).clamp_min(0.0)
        return ItemSums(mass.log(), self.reward - part.reward, self.entropy - part.entropy)

    def replaced(self, row: Tensor, found: ItemSums) -> ItemSums:
        """The sums with those of some rows (n,) replaced."""
        return ItemSums(
            self.log_mass.index_put((row,), found.log_mass),
            self.reward.index_put((row,), found.reward),
            self.entropy.index_put((row,), found.entropy),
        )


@dataclass(frozen=True)
class KindSums:
    """Sums over the new items and over the others."""

    new: ItemSums
    other: ItemSums

    def log_factor(self, limits: NewItemsConfig) -> Tensor:
        """(B, 2) log of the factors by which the limits scale the other items and the new ones."""
        log_total = torch.logaddexp(self.new.log_mass, self.other.log_mass)
        mass = (self.new.log_mass - log_total).exp()
        share = mass.clamp(limits.at_least, limits.at_most)
        changed = (share != mass) & (mass > 0.0) & (mass < 1.0)
        factor = [torch.log1p(-share) - self.other.log_mass, share.log() - self.new.log_mass]
        return torch.stack([torch.where(changed, one, 0.0) for one in factor], dim=1)

    def scaled(self, log_factor: Tensor) -> KindSums:
        """The sums under the policy with limits."""
        return KindSums(self.new.scaled(log_factor[:, 1]), self.other.scaled(log_factor[:, 0]))
