"""The served policy: the trained one with the temperature, uniform share and limit of `serving`.

    pi_served(a|x) = (1 - uniform) softmax(s / temperature)_a + uniform / |eligible items|

Validation, evaluation, export and draws all take it from here. Of a slate this is the distribution
of its first item; the others follow by sampling without replacement (Plackett and Luce).
"""

from __future__ import annotations

import math
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

_MAX_PROBABILITIES = 1 << 22
"""Probabilities held at a time for the entropy of a mixture."""


@dataclass(frozen=True)
class ServedPolicy:
    """The distribution from which a trained policy is served.

    Without settings in `serving` every result has the bits of the trained policy.

    Attributes:
        policy: the trained policy, in evaluation mode.
        serving: how it is served.
    """

    policy: TwoTowerPolicy
    serving: ServingConfig

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
        eligible: Any = None,
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
            eligible: items that each row may show (`offtower.ops.types.Eligibility`); None is all.
            position: (B,) positions from 0, read in mode top_k only; None is 0 for each row.

        Returns:
            Terms of length B. log_normalizer is that of the softmax, 0 in mode top_k. log_prob is
            -inf for an item that is not served.

        Raises:
            OperatorError: as `policy_terms`.
        """
        served, allowed = self.items(items), _keyword(eligible)
        if self.deterministic:
            return self._shown_terms(
                context_embedding, served, action, reward_model, position, allowed
            )
        uniform = self.serving.uniform
        if self.serving.top is not None:
            best = self._best(context_embedding, served, self.serving.top, allowed)
            terms = best.terms(action, reward_model)
        else:
            terms = policy_terms(
                context_embedding,
                served.embedding,
                action,
                temperature=self.temperature,
                item_bias=served.bias,
                reward_model=reward_model,
                entropy=entropy and uniform == 0.0,
                **allowed,
            )
        if uniform == 0.0:
            return terms
        over_all = uniform_terms(context_embedding, served, action, reward_model, eligible)
        mixed = mix_uniform(terms, over_all, uniform)
        if not entropy:
            return replace(mixed, entropy=None)
        if self.serving.top is not None:
            return replace(mixed, entropy=best.mixture_entropy(uniform, over_all.log_normalizer))
        found = self._mixture_entropy(context_embedding, served, terms.log_normalizer, eligible)
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
        position: Tensor | None = None,
    ) -> tuple[PolicyTerms, Tensor]:
        """As `terms`, and S items (B, S) drawn with replacement for each row.

        In mode top_k these are S times the item that is shown at the row's position.
        """
        served = self.items(items)
        if self.deterministic:
            terms = self.terms(
                context_embedding, items, action, reward_model=reward_model, position=position
            )
            shown, _ = self._shown(context_embedding, served, position, {})
            return terms, shown[:, None].expand(-1, draws)
        if self.serving.top is not None:
            terms = self.terms(context_embedding, items, action, reward_model=reward_model)
            return terms, self.draw(context_embedding, items, draws, generator)[0]
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
        return mix_uniform(terms, over_all, uniform), self._with_uniform(drawn, items, generator)

    @torch.no_grad()
    def draw(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        num_samples: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Draw S items (B, S) for each row, with replacement, and their log-probabilities (B, S).

        In mode top_k the k items that are shown, in turn; each has probability 1 at its position.
        """
        served = self.items(items)
        if self.deterministic:
            shown = self._best(context_embedding, served, self.serving.k, {}).item
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
                generator=generator,
                num_samples=num_samples,
            )
            if self.serving.uniform == 0.0:
                return drawn, log_prob
            log_normalizer = self._log_normalizer(context_embedding, served)
        else:
            best = self._best(context_embedding, served, self.serving.top, {})
            drawn, log_normalizer = best.draw(num_samples, generator), best.log_normalizer
        if self.serving.uniform > 0.0:
            drawn = self._with_uniform(drawn, items, generator)
        return drawn, self.log_prob_at(context_embedding, items, drawn, log_normalizer)

    @torch.no_grad()
    def log_prob_at(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        item: Tensor,
        log_normalizer: Tensor,
        position: Tensor | None = None,
    ) -> Tensor:
        """(B, S) float64 log-probabilities of the items (B, S).

        Args:
            log_normalizer: (B,) of the rows' `terms`.
            position: (B,) of the rows, read in mode top_k only.
        """
        served = self.items(items)
        if self.deterministic:
            shown, exists = self._shown(context_embedding, served, position, {})
            return _certain((item == shown[:, None]) & exists[:, None])
        logit = logits_at(context_embedding, served, item, self.temperature)
        log_prob = logit - log_normalizer[:, None].double()
        if self.serving.top is not None:
            best = self._best(context_embedding, served, self.serving.top, {})
            log_prob = log_prob.masked_fill(~best.contains(item), -math.inf)
        if self.serving.uniform == 0.0:
            return log_prob
        log_share = -math.log(items.embedding.shape[0])
        return _log_mixture(log_prob, torch.full_like(log_prob, log_share), self.serving.uniform)

    @torch.no_grad()
    def log_mass(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        member: Tensor,
        log_normalizer: Tensor,
    ) -> Tensor:
        """(B,) float64 log-probability of a set of items, `member` (m,), of which one is shown.

        log_normalizer: (B,) of the rows' `terms`.
        """
        served, rows = self.items(items), len(context_embedding)
        if self.deterministic or self.serving.top is not None:
            count = self.serving.k if self.deterministic else self.serving.top
            assert count is not None
            best = self._best(context_embedding, served, count, {})
            inside = torch.isin(best.item, member)
            if self.deterministic:
                return _certain(inside[:, 0])
            score = best.score.double().masked_fill(~inside, -math.inf)
            log_mass = torch.logsumexp(score, 1) - log_normalizer.double()
        else:
            part = partial_terms(
                context_embedding,
                served.embedding[member],
                torch.full((rows,), -1, dtype=torch.int64, device=member.device),
                temperature=self.temperature,
                item_bias=None if served.bias is None else served.bias[member],
            )
            log_mass = part.sums.log_normalizer.double() - log_normalizer.double()
        if self.serving.uniform == 0.0:
            return log_mass
        share = math.log(len(member) / items.embedding.shape[0])
        return _log_mixture(log_mass, torch.full_like(log_mass, share), self.serving.uniform)

    def _log_normalizer(self, context_embedding: Tensor, served: ItemEmbeddings) -> Tensor:
        action = torch.zeros(
            len(context_embedding), dtype=torch.int64, device=context_embedding.device
        )
        return policy_terms(
            context_embedding,
            served.embedding,
            action,
            temperature=self.temperature,
            item_bias=served.bias,
        ).log_normalizer

    def _best(
        self, context_embedding: Tensor, served: ItemEmbeddings, count: int, allowed: dict[str, Any]
    ) -> _Best:
        score, item = top_k(
            context_embedding.detach(),
            served.embedding.detach(),
            min(count, served.embedding.shape[0]),
            temperature=self.temperature,
            item_bias=None if served.bias is None else served.bias.detach(),
            **allowed,
        )
        return _Best(score, item)

    def _shown(
        self,
        context_embedding: Tensor,
        served: ItemEmbeddings,
        position: Tensor | None,
        allowed: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """(B,) items at the rows' positions in mode top_k, and whether there is one."""
        best = self._best(context_embedding, served, self.serving.k, allowed)
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
        allowed: dict[str, Any],
    ) -> PolicyTerms:
        shown, exists = self._shown(context_embedding, served, position, allowed)
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
        self, drawn: Tensor, items: ItemEmbeddings, generator: torch.Generator
    ) -> Tensor:
        """Replace each draw by one from all items, with probability `uniform`."""
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        coin = torch.rand(drawn.shape, dtype=torch.float64, **options).to(drawn.device)
        other = torch.randint(items.embedding.shape[0], drawn.shape, **options).to(drawn.device)
        return torch.where(coin < self.serving.uniform, other, drawn)

    def _mixture_entropy(
        self,
        context_embedding: Tensor,
        served: ItemEmbeddings,
        log_normalizer: Tensor,
        eligible: Any,
    ) -> Tensor:
        """(B,) entropy of the mixture, summed over all items a block at a time."""
        if eligible is not None:
            raise NotImplementedError("the entropy of a mixture over eligible items")
        rows, count = len(context_embedding), served.embedding.shape[0]
        total = context_embedding.new_zeros(rows, dtype=torch.float64)
        share = -math.log(count)
        size = max(1, _MAX_PROBABILITIES // max(1, rows))
        for start in range(0, count, size):
            part = slice(start, start + size)
            score = (context_embedding @ served.embedding[part].T).double() / self.temperature
            if served.bias is not None:
                score = score + served.bias[part].double()
            softmax = score - log_normalizer[:, None].double()
            log_prob = _log_mixture(softmax, torch.full_like(softmax, share), self.serving.uniform)
            total = total - (log_prob.exp() * log_prob).sum(1)
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
        log_prob = _log_mixture(
            self.log_prob, -log_count[:, None].expand_as(self.log_prob), uniform
        )
        inside = torch.where(found, -log_prob.exp() * log_prob, 0.0).sum(1)
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


def uniform_terms(
    context_embedding: Tensor,
    items: ItemEmbeddings,
    action: Tensor,
    reward_model: DenseReward | FactoredReward | None,
    eligible: Any = None,
) -> PolicyTerms:
    """Terms of the policy that shows every eligible item with the same probability.

    A pass with zero logits; without reward model and restriction none is needed.
    """
    rows, count = len(context_embedding), items.embedding.shape[0]
    if reward_model is None and eligible is None:
        log_count = context_embedding.new_full((rows,), math.log(count))
        return PolicyTerms(-log_count, log_count, None, None, log_count)
    return policy_terms(
        context_embedding.new_zeros(rows, 1),
        items.embedding.new_zeros(count, 1),
        action,
        reward_model=reward_model,
        entropy=True,
        **_keyword(eligible),
    )


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


def _certain(event: Tensor) -> Tensor:
    """log 1 where the event holds, log 0 elsewhere."""
    return torch.zeros(event.shape, dtype=torch.float64, device=event.device).masked_fill(
        ~event, -math.inf
    )


def _keyword(eligible: Any) -> dict[str, Any]:
    return {} if eligible is None else {"eligible": eligible}
