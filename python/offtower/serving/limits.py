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
from offtower.errors import ConfigError
from offtower.models.item_draws import rewards_at
from offtower.models.items import ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import DenseReward, FactoredReward, PolicyTerms
from offtower.ops.categorical import draw_categorical
from offtower.ops.eligibility import Eligibility
from offtower.serving.policy import ServedPolicy
from offtower.serving.shared_terms import SharedTerms
from offtower.slates import Rest

_BLOCK = 1024
"""New items whose probabilities are held at a time."""
_TRIES = 4
"""Draws of the policy without limits until all items are scored for the rows that are left."""


@dataclass(frozen=True)
class _NewItems:
    """Sums over the new items under the policy without limits.

    log_mass: (B,). reward, entropy: (B,) sums of p q and of -p log p; zeros without a model.
    log_factor: (B, 2) log of the factors of the other items and of the new ones.
    """

    log_mass: Tensor
    reward: Tensor
    entropy: Tensor
    log_factor: Tensor

    def of(self, is_new: Tensor) -> Tensor:
        """Factors of items (B, ...) by whether they are new."""
        flat = is_new.long().view(len(is_new), -1)
        return self.log_factor.gather(1, flat).view(is_new.shape)


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
    def _member(self) -> Tensor:
        assert self.new is not None, "limits have the new items"
        return torch.nonzero(self.new)[:, 0]

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
        found = self.inner.terms(
            context_embedding,
            items,
            action,
            reward_model=reward_model,
            entropy=entropy,
            eligible=eligible,
        )
        log_normalizer = found.log_normalizer
        sums = self._sums(context_embedding, items, log_normalizer, eligible, reward_model)
        assert self.new is not None
        log_prob = found.log_prob.double() + sums.of(self.new[action])
        other, new = sums.log_factor.exp().unbind(1)
        expected, spread = found.expected_reward, found.entropy
        if expected is not None:
            rest = expected.double() - sums.reward
            expected = (other * rest + new * sums.reward).to(expected.dtype)
        if spread is not None:
            # -sum c p log(c p) over each kind.
            mass = sums.log_mass.exp()
            rest = spread.double() - sums.entropy
            of_rest = other * (rest - _times_log(sums.log_factor[:, 0], 1.0 - mass))
            of_new = new * (sums.entropy - _times_log(sums.log_factor[:, 1], mass))
            spread = (of_rest + of_new).to(spread.dtype)
        return replace(
            found,
            log_prob=log_prob.to(found.log_prob.dtype),
            expected_reward=expected,
            entropy=spread,
        )

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
        terms = self.terms(
            context_embedding, items, action, reward_model=reward_model, eligible=eligible
        )
        return terms, self.draw(context_embedding, items, draws, generator, eligible)[0]

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
        log_normalizer = terms.log_normalizer
        sums = self._sums(context_embedding, items, log_normalizer, eligible)
        share = (sums.log_mass + sums.log_factor[:, 1]).exp()[:, None]
        coin = torch.rand(
            (len(nothing), num_samples),
            dtype=torch.float64,
            generator=generator,
            device=generator.device,
        )
        wants_new = coin.to(share.device) < share
        drawn = torch.full_like(wants_new, -1, dtype=torch.int64)
        assert self.new is not None
        for _ in range(_TRIES):
            found, _ = self.inner.draw(context_embedding, items, num_samples, generator, eligible)
            take = (drawn < 0) & (self.new[found] == wants_new)
            drawn = torch.where(take, found, drawn)
        for row in torch.nonzero((drawn < 0).any(1))[:, 0].tolist():
            drawn[row] = self._drawn_row(
                row, context_embedding, items, log_normalizer, eligible, wants_new[row], generator
            )
        log_prob = self.log_prob_at(
            context_embedding, items, drawn, log_normalizer, eligible=eligible
        )
        return drawn, log_prob

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
        sums = self._sums(context_embedding, items, log_normalizer, eligible)
        assert self.new is not None
        return found + sums.of(self.new[item])

    @torch.no_grad()
    def log_mass(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        member: Tensor,
        log_normalizer: Tensor,
        *,
        eligible: Eligibility | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        every = self.log_prob_at(
            context_embedding,
            items,
            member.expand(len(context_embedding), -1),
            log_normalizer,
            eligible=eligible,
        )
        return torch.logsumexp(every, 1)

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
        sums = self._sums(context_embedding, items, log_normalizer, eligible)
        of_new = self._sums(context_embedding, items, log_normalizer, eligible, reward_model, shown)
        other, new = sums.log_factor.exp().unbind(1)
        new_mass = of_new.log_mass.exp()
        rest_mass = (whole.log_mass.exp() - new_mass).clamp_min(0.0)
        mass = other * rest_mass + new * new_mass
        mean = whole.expected_reward
        if mean is not None:
            rest_reward = mean.double() * whole.log_mass.exp() - of_new.reward
            mean = (other * rest_reward + new * of_new.reward) / mass
        return Rest(mass.log(), mean)

    def _sums(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        log_normalizer: Tensor,
        eligible: Eligibility | None,
        reward_model: DenseReward | FactoredReward | None = None,
        without: Tensor | None = None,
    ) -> _NewItems:
        """Sums over the new items, but for those in `without` (B, K)."""
        rows = len(context_embedding)
        log_mass = log_normalizer.new_full((rows,), -math.inf, dtype=torch.float64)
        reward, entropy = torch.zeros_like(log_mass), torch.zeros_like(log_mass)
        for some in self._member.split(_BLOCK):
            member = some.expand(rows, -1)
            log_prob = self.inner.log_prob_at(
                context_embedding.detach(), items, member, log_normalizer, eligible=eligible
            )
            if without is not None:
                shown = (member[:, :, None] == without[:, None, :]).any(2)
                log_prob = log_prob.masked_fill(shown, -math.inf)
            probability = log_prob.exp()
            log_mass = torch.logaddexp(log_mass, torch.logsumexp(log_prob, 1))
            entropy = entropy - torch.special.xlogy(probability, probability).sum(1)
            if reward_model is not None:
                reward = reward + (probability * rewards_at(reward_model, member).double()).sum(1)
        limits = self.serving.new_items
        assert limits is not None, "limits are configured"
        mass = log_mass.exp().clamp_max(1.0)
        share = mass.clamp(limits.at_least, limits.at_most)
        share = torch.where((mass <= 0.0) | (mass >= 1.0), mass, share)
        factors = torch.stack(
            [
                torch.where(mass < 1.0, torch.log1p(-share) - torch.log1p(-mass), 0.0),
                torch.where(mass > 0.0, share.log() - log_mass, 0.0),
            ],
            dim=1,
        )
        return _NewItems(log_mass, reward, entropy, factors)

    def _drawn_row(
        self,
        row: int,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        log_normalizer: Tensor,
        eligible: Eligibility | None,
        wants_new: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """(S,) draws of a row from the probabilities of all items, by kind."""
        assert self.new is not None
        one = torch.tensor([row], device=context_embedding.device)
        every = torch.arange(len(self.new), device=context_embedding.device)[None]
        log_prob = self.inner.log_prob_at(
            context_embedding[one],
            items,
            every,
            log_normalizer[one],
            eligible=None if eligible is None else eligible.take(one),
        )
        kinds = [log_prob.masked_fill(self.new[None] != kind, -math.inf) for kind in (False, True)]
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
    if limits.feature not in known or not isinstance(values, np.ndarray):
        raise ConfigError(
            f"serving.new_items.feature '{limits.feature}' is no numeric feature of the "
            f"catalogue; it has {', '.join(known) or 'none'}"
        )
    # Encoded in float32: a threshold halfway between whole numbers is safe from rounding.
    found: NDArray[np.bool_] = encoding.restored(limits.feature, values) < limits.below
    return found


def _times_log(log_factor: Tensor, mass: Tensor) -> Tensor:
    """mass x log_factor, 0 where there is no mass."""
    return torch.where(mass > 0.0, mass * log_factor, 0.0)
