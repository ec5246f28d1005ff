"""The served policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offtower.config import ServingConfig
from offtower.models.item_draws import logits_at, terms_and_draws
from offtower.models.items import ItemEmbeddings
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import (
    DenseReward,
    FactoredReward,
    PolicyTerms,
    partial_terms,
    policy_terms,
    top_k,
)
from offtower.ops.eligibility import Eligibility
from offtower.ops.softmax_sampling import draw_softmax
from offtower.serving.best_items import BestItems
from offtower.serving.mixture import UniformMixture, log_mixture, mix_uniform, uniform_terms
from offtower.serving.shared_terms import SharedTerms
from offtower.slates import Rest

LARGE_LOGIT = 16.0
"""Log-normalizer beyond which the rounding of a float32 logit, 1e-6 here, is corrected."""


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
            double = context_embedding.dtype == torch.float64
            dtype = torch.float64 if double else torch.float32
            shown = self._best(context_embedding, served, self.serving.k, eligible).at(position)
            return shown.terms(action, reward_model, dtype)
        uniform = self.serving.uniform
        if self.serving.top is not None:
            best = self._best(context_embedding, served, self.serving.top, eligible)
            terms = best.terms(action, reward_model)
        else:
            softmax_entropy = entropy and uniform == 0.0
            terms = self._shared(
                ("softmax", self.temperature, softmax_entropy),
                (context_embedding, items, action, reward_model, eligible),
                lambda: self._refined(
                    policy_terms(
                        context_embedding,
                        served.embedding,
                        action,
                        temperature=self.temperature,
                        item_bias=served.bias,
                        reward_model=reward_model,
                        entropy=softmax_entropy,
                        eligible=eligible,
                    ),
                    context_embedding,
                    served,
                    action,
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
        found = self._mixture(served).entropy(
            context_embedding, terms.log_normalizer, over_all.log_normalizer, eligible
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
            best = self._best(context_embedding, served, self.serving.k, eligible)
            return terms, best.at(position).item[:, None].expand(-1, draws)
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
        drawn = self._mixture(served).replaced(drawn, generator, None)
        return mix_uniform(terms, over_all, uniform), drawn

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
            found = draw_softmax(
                context_embedding,
                served.embedding,
                temperature=self.temperature,
                item_bias=served.bias,
                eligible=eligible,
                generator=generator,
                num_samples=num_samples,
            )
            if self.serving.uniform == 0.0:
                return found.item, found.log_prob
            drawn, log_normalizer = found.item, found.log_normalizer
        else:
            best = self._best(context_embedding, served, self.serving.top, eligible)
            drawn, log_normalizer = best.draw(num_samples, generator), best.log_normalizer
        if self.serving.uniform > 0.0:
            drawn = self._mixture(served).replaced(drawn, generator, eligible)
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
            best = self._best(context_embedding, served, self.serving.k, eligible)
            return best.at(position).log_prob_at(item)
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
        return log_mixture(log_prob, log_share, self.serving.uniform)

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
        served = self.items(items)
        without = _excluding(shown, eligible)
        if self.serving.top is not None:
            best = self._best(context_embedding, served, self.serving.top, eligible)
            softmax = best.rest(shown, reward_model)
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
            mean = None if part.expected_reward is None else part.expected_reward.double()
            log_mass = part.top.double() + part.total.double().log()
            softmax = Rest(log_mass - log_normalizer.double(), mean)
        if self.serving.uniform == 0.0:
            return softmax
        count = items.embedding.shape[0]
        log_count = torch.full_like(softmax.log_mass, math.log(count))
        if eligible is not None:
            log_count = eligible.count(count).double().log()
        return self._mixture(served).rest(softmax, log_count, without, reward_model)

    def _refined(
        self, terms: PolicyTerms, context_embedding: Tensor, served: ItemEmbeddings, action: Tensor
    ) -> PolicyTerms:
        """The terms with the logged item's logit in float64, where its rounding matters.

        With s the float32 logit of an item of probability p and s + e the one in float64, the
        log-probability grows by (1 - p) e and the log-normalizer by p e, to first order. Terms with
        a gradient stay as they are.
        """
        large = terms.log_normalizer.abs() > LARGE_LOGIT
        if torch.is_grad_enabled() or terms.log_prob.dtype == torch.float64 or not large.any():
            return terms
        row = torch.nonzero(large)[:, 0]
        log_prob, log_normalizer = terms.log_prob.double(), terms.log_normalizer.double()
        logit = logits_at(context_embedding[row], served, action[row, None], self.temperature)[:, 0]
        error = logit - (log_prob[row] + log_normalizer[row])
        log_prob[row] += (1.0 - log_prob[row].exp()) * error
        log_normalizer[row] = logit - log_prob[row]
        return replace(terms, log_prob=log_prob, log_normalizer=log_normalizer)

    def _mixture(self, served: ItemEmbeddings) -> UniformMixture:
        return UniformMixture(served, self.temperature, self.serving.uniform)

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
    ) -> BestItems:
        score, item = top_k(
            context_embedding.detach(),
            served.embedding.detach(),
            min(count, served.embedding.shape[0]),
            temperature=self.temperature,
            item_bias=None if served.bias is None else served.bias.detach(),
            eligible=eligible,
        )
        if self.deterministic or score.dtype == torch.float64:
            return BestItems(score, item)
        exact = logits_at(context_embedding, served, item.clamp_min(0), self.temperature)
        return BestItems(torch.where(item < 0, score.double(), exact), item)


def _excluding(shown: Tensor, eligible: Eligibility | None) -> Eligibility:
    """The eligible items without those shown, (B, K) with -1 for none."""
    rows = torch.arange(len(shown), dtype=torch.int64, device=shown.device)
    row, item = rows[:, None].expand_as(shown)[shown >= 0], shown[shown >= 0]
    return (eligible or Eligibility()).excluding(row, item, len(shown))
