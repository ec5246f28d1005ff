"""Limits on the share of new items in what a policy shows, with exact probabilities.

With p the served policy without limits and P = p(new|x), the policy shows a new item with
probability s = P clamped to [at_least, at_most], and chooses among the new items, and among the
others, as p does:

    pi(a|x) = p(a|x) s / P  for new a,   p(a|x) (1 - s) / (1 - P)  for the others.

So the limits hold in every context in which p can show both kinds, and a context within them is
served as without them. A context in which p shows only one kind is served as p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.config import NewItemsConfig, ServingConfig
from offtower.data.encoding import BagArray, FeatureEncoding
from offtower.models.item_draws import rewards_at
from offtower.models.items import ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import DenseReward, FactoredReward, PolicyTerms
from offtower.ops.categorical import draw_categorical
from offtower.ops.eligibility import Eligibility
from offtower.serving.kind_sums import ContextRows, ItemSums, KindSums
from offtower.serving.policy import ServedPolicy
from offtower.serving.shared_terms import SharedTerms
from offtower.slates import Rest

_BLOCK = 1024
"""Items whose probabilities are held at a time."""
_RARE = 0.01
"""Probability of the other items up to which they are summed: as the rest of the new ones it would
be rounding, which the factor of the others magnifies."""
_TRIES = 4
"""Draws of the policy without limits until all items are scored for the rows that are left."""


@dataclass(frozen=True)
class LimitedPolicy(ServedPolicy):
    """A served policy whose share of new items has limits.

    Attributes:
        new: (N,) bool, the new items.
    """

    new: Tensor | None = None

    @cached_property
    def inner(self) -> ServedPolicy:
        """The policy without limits."""
        return ServedPolicy(self.policy, replace(self.serving, new_items=None), self.shared)

    @cached_property
    def _is_new(self) -> Tensor:
        assert self.new is not None, "limits have the new items"
        return self.new

    @cached_property
    def _limits(self) -> NewItemsConfig:
        assert self.serving.new_items is not None, "limits are configured"
        return self.serving.new_items

    def terms(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        action: Tensor,
        *,
        reward_model: DenseReward | FactoredReward | None = None,
        entropy: bool = False,
        eligible: Eligibility | None = None,
        position: Tensor | None = None,
    ) -> PolicyTerms:
        rows = (context_embedding, items, action)
        return self._scored(*rows, reward_model, entropy, eligible)[0]

    def _scored(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        action: Tensor,
        reward_model: DenseReward | FactoredReward | None = None,
        entropy: bool = False,
        eligible: Eligibility | None = None,
    ) -> tuple[PolicyTerms, ContextRows, KindSums]:
        """As `terms`, and what `_drawn` reads: the rows, and the sums without limits."""
        found = self.inner.terms(
            context_embedding,
            items,
            action,
            reward_model=reward_model,
            entropy=entropy,
            eligible=eligible,
        )
        contexts = ContextRows(
            context_embedding, items, found.log_normalizer, eligible, reward_model
        )
        zero = torch.zeros_like(found.log_prob, dtype=torch.float64)
        expected, spread = found.expected_reward, found.entropy
        total = ItemSums(
            zero,
            zero if expected is None else expected.double(),
            zero if spread is None else spread.double(),
        )
        kinds = self._kinds(contexts, total)
        log_factor = kinds.log_factor(self._limits)
        log_prob = found.log_prob.double() + _of_items(log_factor, self._is_new[action])
        scaled = kinds.scaled(log_factor)
        if expected is not None:
            expected = (scaled.other.reward + scaled.new.reward).to(expected.dtype)
        if spread is not None:
            spread = (scaled.other.entropy + scaled.new.entropy).to(spread.dtype)
        terms = replace(
            found,
            log_prob=log_prob.to(found.log_prob.dtype),
            expected_reward=expected,
            entropy=spread,
        )
        return terms, contexts, kinds

    def terms_and_draws(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        action: Tensor,
        *,
        draws: int,
        generator: torch.Generator,
        reward_model: DenseReward | FactoredReward | None = None,
        eligible: Eligibility | None = None,
        position: Tensor | None = None,
    ) -> tuple[PolicyTerms, Tensor]:
        rows = (context_embedding, items, action)
        terms, contexts, kinds = self._scored(*rows, reward_model, eligible=eligible)
        return terms, self._drawn(contexts, kinds, draws, generator)

    @torch.no_grad()
    def draw(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        num_samples: int,
        generator: torch.Generator,
        eligible: Eligibility | None = None,
    ) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(
            len(context_embedding), dtype=torch.int64, device=context_embedding.device
        )
        terms = self.inner.terms(context_embedding, items, nothing, eligible=eligible)
        contexts = ContextRows(context_embedding, items, terms.log_normalizer, eligible)
        kinds = self._kinds(contexts)
        drawn = self._drawn(contexts, kinds, num_samples, generator)
        log_prob = self.inner.log_prob_at(
            context_embedding, items, drawn, terms.log_normalizer, eligible=eligible
        )
        return drawn, log_prob + _of_items(kinds.log_factor(self._limits), self._is_new[drawn])

    @torch.no_grad()
    def _drawn(
        self, contexts: ContextRows, kinds: KindSums, num_samples: int, generator: torch.Generator
    ) -> Tensor:
        """(B, S) items drawn with replacement."""
        scaled = kinds.scaled(kinds.log_factor(self._limits))
        masses = torch.stack([scaled.other.log_mass, scaled.new.log_mass], dim=1)
        share = torch.softmax(masses, dim=1)[:, 1:]
        coin = torch.rand(
            (len(share), num_samples),
            dtype=torch.float64,
            generator=generator,
            device=generator.device,
        )
        wants_new = coin.to(share.device) < share
        drawn = torch.full_like(wants_new, -1, dtype=torch.int64)
        for _ in range(_TRIES):
            found, _ = self.inner.draw(
                contexts.embedding, contexts.items, num_samples, generator, contexts.eligible
            )
            take = (drawn < 0) & (self._is_new[found] == wants_new)
            drawn = torch.where(take, found, drawn)
        for row in torch.nonzero((drawn < 0).any(1))[:, 0].tolist():
            one = torch.tensor([row], device=share.device)
            drawn[row] = self._drawn_row(contexts.take(one), wants_new[row], generator)
        return drawn

    @torch.no_grad()
    def log_prob_at(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        item: Tensor,
        log_normalizer: Tensor,
        *,
        eligible: Eligibility | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        found = self.inner.log_prob_at(
            context_embedding, items, item, log_normalizer, eligible=eligible
        )
        kinds = self._kinds(ContextRows(context_embedding, items, log_normalizer, eligible))
        return found + _of_items(kinds.log_factor(self._limits), self._is_new[item])

    @torch.no_grad()
    def rest(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        shown: Tensor,
        log_normalizer: Tensor,
        *,
        reward_model: DenseReward | FactoredReward | None = None,
        eligible: Eligibility | None = None,
    ) -> Rest:
        whole = self.inner.rest(
            context_embedding,
            items,
            shown,
            log_normalizer,
            reward_model=reward_model,
            eligible=eligible,
        )
        contexts = ContextRows(context_embedding, items, log_normalizer, eligible, reward_model)
        log_factor = self._kinds(contexts).log_factor(self._limits)
        log_mass, mean = whole.log_mass.double(), whole.expected_reward
        zero = torch.zeros_like(log_mass)
        total = ItemSums(log_mass, zero if mean is None else mean.double() * log_mass.exp(), zero)
        scaled = self._kinds(contexts, total, shown).scaled(log_factor)
        log_left = torch.logaddexp(scaled.other.log_mass, scaled.new.log_mass)
        if mean is not None:
            mean = (scaled.other.reward + scaled.new.reward) / log_left.exp()
        return Rest(log_left, mean)

    def _kinds(
        self, contexts: ContextRows, total: ItemSums | None = None, without: Tensor | None = None
    ) -> KindSums:
        """Sums over both kinds of items, but for those in `without` (B, K).

        Args:
            total: over both kinds; by default of probability 1, without reward and entropy.
        """
        if total is None:
            zero = torch.zeros_like(contexts.log_normalizer, dtype=torch.float64)
            total = ItemSums(zero, zero, zero)
        new = self._sums(contexts, self._is_new, without)
        other = total.without(new)
        rare = torch.nonzero(other.log_mass - total.log_mass < math.log(_RARE))[:, 0]
        if len(rare):
            shown = None if without is None else without[rare]
            other = other.replaced(rare, self._sums(contexts.take(rare), ~self._is_new, shown))
        return KindSums(new, other)

    def _sums(self, contexts: ContextRows, kind: Tensor, without: Tensor | None) -> ItemSums:
        """Sums over the items of `kind` (N,) bool, but for those in `without` (B, K)."""
        rows = len(contexts.embedding)
        log_mass = contexts.log_normalizer.new_full((rows,), -math.inf, dtype=torch.float64)
        reward, entropy = torch.zeros_like(log_mass), torch.zeros_like(log_mass)
        for some in torch.nonzero(kind)[:, 0].split(_BLOCK):
            member = some.expand(rows, -1)
            log_prob = self.inner.log_prob_at(
                contexts.embedding.detach(),
                contexts.items,
                member,
                contexts.log_normalizer,
                eligible=contexts.eligible,
            )
            if without is not None:
                shown = (member[:, :, None] == without[:, None, :]).any(2)
                log_prob = log_prob.masked_fill(shown, -math.inf)
            probability = log_prob.exp()
            log_mass = torch.logaddexp(log_mass, torch.logsumexp(log_prob, 1))
            entropy = entropy - torch.special.xlogy(probability, probability).sum(1)
            if contexts.reward is not None:
                value = rewards_at(contexts.reward, member).double()
                reward = reward + (probability * value).sum(1)
        return ItemSums(log_mass, reward, entropy)

    def _drawn_row(
        self, context: ContextRows, wants_new: Tensor, generator: torch.Generator
    ) -> Tensor:
        """(S,) draws of one row from the probabilities of all items, by kind."""
        every = torch.arange(len(self._is_new), device=wants_new.device)[None]
        log_prob = self.inner.log_prob_at(
            context.embedding,
            context.items,
            every,
            context.log_normalizer,
            eligible=context.eligible,
        )
        other, new = ~self._is_new[None], self._is_new[None]
        kinds = [log_prob.masked_fill(~kind, -math.inf) for kind in (other, new)]
        found = [
            draw_categorical(torch.log_softmax(kind, 1), len(wants_new), generator)[0]
            if torch.isfinite(kind).any()
            else wants_new.long()
            for kind in kinds
        ]
        return torch.where(wants_new, found[1], found[0])


def served_policy(
    policy: TwoTowerPolicy,
    serving: ServingConfig,
    new: Tensor | None = None,
    shared: SharedTerms | None = None,
) -> ServedPolicy:
    """The served policy of any settings.

    Args:
        new: (N,) bool, the new items; needed where `serving.new_items` limits their share.
    """
    if serving.new_items is None:
        return ServedPolicy(policy, serving, shared)
    return LimitedPolicy(policy, serving, shared, new)


def new_items(limits: NewItemsConfig, encoding: FeatureEncoding, items: ItemFeatures) -> Tensor:
    """(N,) bool, the items of a catalogue that `limits` calls new, on their device.

    Args:
        encoding: of the items. items: their features.

    Raises:
        ConfigError: the feature is not a number of the catalogue.
    """
    values = items.part(0, items.num_items).arrays.get(limits.feature)
    number = new_numbers(limits, encoding, values)
    return torch.from_numpy(number).to(items.device)


def new_numbers(
    limits: NewItemsConfig, encoding: FeatureEncoding, values: np.ndarray | BagArray | None
) -> NDArray[np.bool_]:
    """(n,) whether items are new, by the encoded values of the feature.

    Raises:
        ConfigError: as for `new_items`.
    """
    known = [spec.name for spec in encoding.specs if spec.kind == "numeric"]
    limits.check_feature(known)
    assert isinstance(values, np.ndarray)
    # Items and threshold are rounded alike, so that an item at the threshold is not new.
    found: NDArray[np.bool_] = values < encoding.standardized(limits.feature, limits.below)
    return found


def _of_items(log_factor: Tensor, is_new: Tensor) -> Tensor:
    """Factors (B, 2) of items (B, ...) by whether they are new."""
    flat = is_new.long().view(len(is_new), -1)
    return log_factor.gather(1, flat).view(is_new.shape)
