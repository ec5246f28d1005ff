"""The served policy: the trained one with the temperature, uniform share and limit of `serving`.

    pi_served(a|x) = (1 - uniform) softmax(s / temperature)_a + uniform / |eligible items|

Validation, evaluation, export and draws all take it from here. Of a slate this is the distribution
of its first item; the others follow by sampling without replacement (Plackett and Luce).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offtower.config import ServingConfig
from offtower.models.item_draws import logits_at, rewards_at, terms_and_draws
from offtower.models.items import ItemEmbeddings
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import (
    DenseReward,
    FactoredReward,
    PolicyTerms,
    partial_terms,
    policy_terms,
    sample_softmax,
    top_k,
)
from offtower.ops.categorical import draw_categorical
from offtower.ops.eligibility import Eligibility, ItemMask
from offtower.slates import Rest

_MAX_PROBABILITIES = 1 << 22
"""Probabilities held at a time for the entropy of a mixture."""


class SharedTerms:
    """Terms of a batch, computed once for policies that serve the same scores differently."""

    def __init__(self) -> None:
        # The operands are kept, so that no other object takes over the id of one of them.
        self._found: dict[tuple[Any, ...], tuple[Any, PolicyTerms]] = {}

    def get(
        self,
        setting: tuple[Any, ...],
        operands: tuple[Any, ...],
        compute: Callable[[], PolicyTerms],
    ) -> PolicyTerms:
        """The terms of a setting on these very operands."""
        key = (*setting, *map(id, operands))
        if key not in self._found:
            self._found[key] = (operands, compute())
        return self._found[key][1]


@dataclass(frozen=True)
class ServedPolicy:
    """The distribution from which a trained policy is served.

    Without settings in `serving` every result has the bits of the trained policy.

    Attributes:
        policy: the trained policy, in evaluation mode.
        serving: how it is served.
        shared: of the batch that is scored; None computes everything.
    """

    policy: TwoTowerPolicy
    serving: ServingConfig
    shared: SharedTerms | None = None

    @property
    def temperature(self) -> float:
        """The temperature for the operators: that of the policy times that of `serving`."""
        return self.policy.temperature * self.serving.temperature

    @property
    def deterministic(self) -> bool:
        """Whether the k best items are always shown (mode top_k).

        `terms` then reads the position of a row, and its log_prob (0 or -inf) is already that of
        the item given the items above it.
        """
        return self.serving.mode == "top_k"

    def items(self, items: ItemEmbeddings) -> ItemEmbeddings:
        """The items with the bias that belongs to `temperature`."""
        if items.bias is None or self.serving.temperature == 1.0:
            return items
        return ItemEmbeddings(items.embedding, items.bias / self.serving.temperature)

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
        """Per-row terms of the served policy, as `TwoTowerPolicy.terms`.

        A uniform share adds the mean of q over all eligible items, from one more pass. `top` is a
        search for the best items; all terms follow from their scores. The entropy of a softmax over
        all items mixed with uniform draws has no closed form: it is summed over all items, in
        blocks of bounded memory. Gradients pass through a softmax over all items only.

        Args:
            context_embedding: (B, d). items: N of them. action: (B,) logged items.
            reward_model: q, for expected_reward and action_reward.
            entropy: compute the entropy, in nats.
            eligible: the items that each row may show; None is all.
            position: (B,) positions from 0, read in mode top_k only; None is 0 for each row.

        Returns:
            Terms of length B. log_normalizer is that of the softmax, 0 in mode top_k. log_prob is
            -inf for an item that is not served.

        Raises:
            OperatorError: as `policy_terms`.
        """
        served = self.items(items)
        if self.deterministic:
            return self._shown_terms(
                context_embedding, served, action, reward_model, position, eligible
            )
        uniform = self.serving.uniform
        if self.serving.top is not None:
            best = self._best(context_embedding, served, self.serving.top, eligible)
            terms = best.terms(action, reward_model)
        else:
            softmax_entropy = entropy and uniform == 0.0
            terms = self._shared(
                ("softmax", self.temperature, softmax_entropy),
                (context_embedding, items, action, reward_model, eligible),
                lambda: policy_terms(
                    context_embedding,
                    served.embedding,
                    action,
                    temperature=self.temperature,
                    item_bias=served.bias,
                    reward_model=reward_model,
                    entropy=softmax_entropy,
                    eligible=eligible,
                ),
            )
        if uniform == 0.0:
            return terms
        over_all = self._shared(
            ("uniform",),
            (context_embedding, items, action, reward_model, eligible),
            lambda: uniform_terms(context_embedding, served, action, reward_model, eligible),
        )
        mixed = mix_uniform(terms, over_all, uniform)
        if not entropy:
            return replace(mixed, entropy=None)
        if self.serving.top is not None:
            return replace(mixed, entropy=best.mixture_entropy(uniform, over_all.log_normalizer))
        found = self._mixture_entropy(
            context_embedding, served, terms.log_normalizer, over_all, eligible
        )
        return replace(mixed, entropy=found)

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
        """As `terms`, and S items (B, S) drawn with replacement for each row.

        In mode top_k these are S times the item that is shown at the row's position.
        """
        served = self.items(items)
        if self.deterministic or self.serving.top is not None or eligible is not None:
            terms = self.terms(
                context_embedding,
                items,
                action,
                reward_model=reward_model,
                eligible=eligible,
                position=position,
            )
        if self.deterministic:
            shown, _ = self._shown(context_embedding, served, position, eligible)
            return terms, shown[:, None].expand(-1, draws)
        if self.serving.top is not None or eligible is not None:
            return terms, self.draw(context_embedding, items, draws, generator, eligible)[0]
        terms, drawn = terms_and_draws(
            context_embedding,
            served,
            action,
            draws=draws,
            generator=generator,
            temperature=self.temperature,
            reward_model=reward_model,
        )
        uniform = self.serving.uniform
        if uniform == 0.0:
            return terms, drawn
        over_all = uniform_terms(context_embedding, served, action, reward_model)
        return mix_uniform(terms, over_all, uniform), self._with_uniform(
            drawn, items, generator, None
        )

    @torch.no_grad()
    def draw(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        num_samples: int,
        generator: torch.Generator,
        eligible: Eligibility | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw S items (B, S) for each row, with replacement, and their log-probabilities (B, S).

        In mode top_k the k items that are shown, in turn; each has probability 1 at its position.
        """
        served = self.items(items)
        if self.deterministic:
            shown = self._best(context_embedding, served, self.serving.k, eligible).item
            turn = (
                torch.arange(num_samples, dtype=torch.int64, device=shown.device) % shown.shape[1]
            )
            return shown[:, turn], shown.new_zeros(len(shown), num_samples, dtype=torch.float64)
        if self.serving.top is None:
            drawn, log_prob = sample_softmax(
                context_embedding,
                served.embedding,
                temperature=self.temperature,
                item_bias=served.bias,
                eligible=eligible,
                generator=generator,
                num_samples=num_samples,
            )
            if self.serving.uniform == 0.0:
                return drawn, log_prob
            log_normalizer = policy_terms(
                context_embedding,
                served.embedding,
                drawn[:, 0],
                temperature=self.temperature,
                item_bias=served.bias,
                eligible=eligible,
            ).log_normalizer
        else:
            best = self._best(context_embedding, served, self.serving.top, eligible)
            drawn, log_normalizer = best.draw(num_samples, generator), best.log_normalizer
        if self.serving.uniform > 0.0:
            drawn = self._with_uniform(drawn, items, generator, eligible)
        return drawn, self.log_prob_at(
            context_embedding, items, drawn, log_normalizer, eligible=eligible
        )

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
        """(B, S) float64 log-probabilities of the items (B, S).

        Args:
            log_normalizer: (B,) of the rows' `terms`.
            position: (B,) of the rows, read in mode top_k only.
        """
        served = self.items(items)
        if self.deterministic:
            shown, exists = self._shown(context_embedding, served, position, eligible)
            return _certain((item == shown[:, None]) & exists[:, None])
        logit = logits_at(context_embedding, served, item, self.temperature)
        log_prob = logit - log_normalizer[:, None].double()
        log_share = logit.new_full((len(item), 1), -math.log(items.embedding.shape[0]))
        if eligible is not None:
            log_share = -eligible.count(items.embedding.shape[0]).double().log()[:, None]
            row = torch.arange(len(item), dtype=torch.int64, device=item.device)
            there = eligible.contains(row[:, None].expand_as(item).flatten(), item.flatten())
            log_share = log_share.expand_as(log_prob).masked_fill(~there.view_as(item), -math.inf)
            log_prob = log_prob.masked_fill(~there.view_as(item), -math.inf)
        if self.serving.top is not None:
            best = self._best(context_embedding, served, self.serving.top, eligible)
            log_prob = log_prob.masked_fill(~best.contains(item), -math.inf)
        if self.serving.uniform == 0.0:
            return log_prob
        return _log_mixture(log_prob, log_share, self.serving.uniform)

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
        """(B,) float64 log-probability that the item is one of a set, `member` (m,).

        log_normalizer: (B,) of the rows' `terms`; the others as in `log_prob_at`.
        """
        rows, served = len(context_embedding), self.items(items)
        if not self.serving.is_softmax or eligible is not None:
            every = self.log_prob_at(
                context_embedding,
                items,
                member.expand(rows, -1),
                log_normalizer,
                eligible=eligible,
                position=position,
            )
            return torch.logsumexp(every, 1)
        part = partial_terms(
            context_embedding,
            served.embedding[member],
            torch.full((rows,), -1, dtype=torch.int64, device=member.device),
            temperature=self.temperature,
            item_bias=None if served.bias is None else served.bias[member],
        )
        return part.sums.log_normalizer.double() - log_normalizer.double()

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
        """Probability and mean reward of the items that a round does not show, for a single draw.

        A sum over those items, without the cancellation of 1 - sum p. Not for mode top_k.

        Args:
            shown: (B, K) items of each round; -1 beyond its last position.
            log_normalizer: (B,) of the rows' `terms`; the others as there.
        """
        served, uniform = self.items(items), self.serving.uniform
        without = _excluding(shown, eligible)
        if self.serving.top is not None:
            best = self._best(context_embedding, served, self.serving.top, eligible)
            hidden = (best.item[:, :, None] == shown[:, None, :]).any(2)
            log_prob = best.log_prob.masked_fill(hidden, -math.inf)
            log_mass, mean = torch.logsumexp(log_prob, 1), None
            if reward_model is not None:
                reward = rewards_at(reward_model, best.item.clamp_min(0)).double()
                mean = (log_prob.exp() * reward).sum(1) / log_mass.exp()
        else:
            part = partial_terms(
                context_embedding,
                served.embedding,
                torch.full_like(shown[:, 0], -1),
                temperature=self.temperature,
                item_bias=served.bias,
                reward_model=reward_model,
                eligible=without,
            ).sums
            log_mass = part.log_normalizer.double() - log_normalizer.double()
            mean = None if part.expected_reward is None else part.expected_reward.double()
        if uniform == 0.0:
            return Rest(log_mass, mean)
        count = items.embedding.shape[0]
        over_all = partial_terms(
            context_embedding.new_zeros(len(shown), 1),
            items.embedding.new_zeros(count, 1),
            torch.full_like(shown[:, 0], -1),
            reward_model=reward_model,
            eligible=without,
        ).sums
        log_count = torch.full_like(log_mass, math.log(count))
        if eligible is not None:
            log_count = eligible.count(count).double().log()
        log_share = over_all.log_normalizer.double() - log_count
        mixed = _log_mixture(log_mass, log_share, uniform)
        if mean is not None and over_all.expected_reward is not None:
            drawn = (1.0 - uniform) * torch.where(torch.isneginf(log_mass), 0.0, mean)
            spread = uniform * log_share.exp() * over_all.expected_reward.double()
            mean = (drawn * log_mass.exp() + spread) / mixed.exp()
        return Rest(mixed, mean)

    def _shared(
        self,
        setting: tuple[Any, ...],
        operands: tuple[Any, ...],
        compute: Callable[[], PolicyTerms],
    ) -> PolicyTerms:
        if self.shared is None:
            return compute()
        return self.shared.get(setting, operands, compute)

    def _best(
        self,
        context_embedding: Tensor,
        served: ItemEmbeddings,
        count: int,
        eligible: Eligibility | None,
    ) -> _Best:
        score, item = top_k(
            context_embedding.detach(),
            served.embedding.detach(),
            min(count, served.embedding.shape[0]),
            temperature=self.temperature,
            item_bias=None if served.bias is None else served.bias.detach(),
            eligible=eligible,
        )
        return _Best(score, item)

    def _shown(
        self,
        context_embedding: Tensor,
        served: ItemEmbeddings,
        position: Tensor | None,
        eligible: Eligibility | None,
    ) -> tuple[Tensor, Tensor]:
        """(B,) items at the rows' positions in mode top_k, and whether there is one."""
        best = self._best(context_embedding, served, self.serving.k, eligible)
        if position is None:
            position = best.item.new_zeros(len(best.item))
        last = best.item.shape[1] - 1
        at = position.clamp(0, last)[:, None]
        exists = (position <= last) & torch.isfinite(best.score.gather(1, at)[:, 0])
        return best.item.gather(1, at)[:, 0].clamp_min(0), exists

    def _shown_terms(
        self,
        context_embedding: Tensor,
        served: ItemEmbeddings,
        action: Tensor,
        reward_model: DenseReward | FactoredReward | None,
        position: Tensor | None,
        eligible: Eligibility | None,
    ) -> PolicyTerms:
        shown, exists = self._shown(context_embedding, served, position, eligible)
        double = context_embedding.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        log_prob = _certain((shown == action) & exists).to(dtype)
        expected = action_reward = None
        if reward_model is not None:
            action_reward = rewards_at(reward_model, action[:, None])[:, 0]
            expected = rewards_at(reward_model, shown[:, None])[:, 0] * exists
        zero = torch.zeros_like(log_prob)
        return PolicyTerms(log_prob, zero, expected, action_reward, zero)

    def _with_uniform(
        self,
        drawn: Tensor,
        items: ItemEmbeddings,
        generator: torch.Generator,
        eligible: Eligibility | None,
    ) -> Tensor:
        """Replace each draw by one from all eligible items, with probability `uniform`."""
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        coin = torch.rand(drawn.shape, dtype=torch.float64, **options).to(drawn.device)
        rows, count = len(drawn), items.embedding.shape[0]
        if eligible is None:
            other = torch.randint(count, drawn.shape, **options).to(drawn.device)
        else:
            other, _ = sample_softmax(
                items.embedding.new_zeros(rows, 1),
                items.embedding.new_zeros(count, 1),
                eligible=eligible,
                generator=generator,
                num_samples=drawn.shape[1],
            )
        return torch.where(coin < self.serving.uniform, other, drawn)

    def _mixture_entropy(
        self,
        context_embedding: Tensor,
        served: ItemEmbeddings,
        log_normalizer: Tensor,
        over_all: PolicyTerms,
        eligible: Eligibility | None,
    ) -> Tensor:
        """(B,) entropy of the mixture, summed over all items a block at a time."""
        rows, count = len(context_embedding), served.embedding.shape[0]
        shift, log_share = log_normalizer[:, None].double(), -over_all.log_normalizer[:, None]
        total = context_embedding.new_zeros(rows, dtype=torch.float64)
        if eligible is not None:
            eligible = eligible.resolved()
        if eligible is not None and eligible.candidates is not None:
            row, item = eligible.candidates.entry_rows(), eligible.candidates.items
            logit = logits_at(context_embedding[row], served, item[:, None], self.temperature)
            entropy = _entropy_terms(logit - shift[row], log_share[row], self.serving.uniform)
            return total.index_add(0, row, entropy[:, 0]).to(log_normalizer.dtype)
        mask = None if eligible is None else ItemMask(eligible)
        size = max(64, _MAX_PROBABILITIES // max(1, rows) // 64 * 64)
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            score = (context_embedding @ served.embedding[part].T).double() / self.temperature
            if served.bias is not None:
                score = score + served.bias[part].double()
            entropy = _entropy_terms(score - shift, log_share, self.serving.uniform)
            if mask is not None:
                entropy = entropy.masked_fill(mask.ineligible(start, part.stop, rows), 0.0)
            total = total + entropy.sum(1)
        return total.to(log_normalizer.dtype)


@dataclass(frozen=True)
class _Best:
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
        entropy = _entropy_terms(self.log_prob, -log_count[:, None], uniform)
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


def _excluding(shown: Tensor, eligible: Eligibility | None) -> Eligibility:
    """The eligible items without those shown, (B, K) with -1 for none."""
    rows = torch.arange(len(shown), dtype=torch.int64, device=shown.device)
    row, item = rows[:, None].expand_as(shown)[shown >= 0], shown[shown >= 0]
    return (eligible or Eligibility()).excluding(row, item, len(shown))


def served_probabilities(logits: Tensor, serving: ServingConfig) -> Tensor:
    """(B, N) probabilities of the served policy, from the trained one's logits (B, N).

    For small catalogues. Items that are not eligible have logits of -inf. In mode top_k the best
    item has probability 1.
    """
    score, count = logits / serving.temperature, logits.shape[1]
    top = 1 if serving.mode == "top_k" else serving.top
    if top is not None and top < count:
        # Stable: ties go to the lowest number, as in `ops.top_k`.
        worse = torch.argsort(score, dim=1, descending=True, stable=True)[:, top:]
        score = score.scatter(1, worse, -math.inf)
    softmax = torch.softmax(score, dim=1)
    if serving.uniform == 0.0:
        return softmax
    eligible = torch.isfinite(logits).to(logits.dtype)
    share = eligible / eligible.sum(1, keepdim=True)
    return (1.0 - serving.uniform) * softmax + serving.uniform * share


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
    log_prob = _log_mixture(terms.log_prob.double(), over_all.log_prob.double(), uniform)
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


def _log_mixture(log_softmax: Tensor, log_uniform: Tensor, uniform: float) -> Tensor:
    """log((1 - uniform) exp(log_softmax) + uniform exp(log_uniform)), where either may be -inf."""
    rest = math.log1p(-uniform) if uniform < 1.0 else -math.inf
    return torch.logaddexp(log_softmax + rest, log_uniform + math.log(uniform))


def _entropy_terms(log_softmax: Tensor, log_uniform: Tensor, uniform: float) -> Tensor:
    """-p log p of the mixture."""
    log_prob = _log_mixture(log_softmax, log_uniform, uniform)
    return -log_prob.exp() * log_prob


def _certain(event: Tensor) -> Tensor:
    """log 1 where the event holds, log 0 elsewhere."""
    return torch.zeros(event.shape, dtype=torch.float64, device=event.device).masked_fill(
        ~event, -math.inf
    )
