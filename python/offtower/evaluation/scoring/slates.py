"""Slates under a policy: conditional probabilities and expected rewards, one pass a round.

A round has one context, so one pass over the catalogue gives the normalizer (and the expected
reward) of all of its rows. Where the shown items hold nearly all mass, a second pass without them
gives the mass that is left, which 1 - sum p would lose to cancellation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offtower.data.rounds import Rounds
from offtower.data.rows import EncodedRows
from offtower.evaluation.rows import ModelPredictions
from offtower.evaluation.scoring.rewards import BatchReward, CatalogueReward
from offtower.models.item_draws import reward_of_rows
from offtower.models.items import ItemEmbeddings
from offtower.ops import Eligibility, PolicyTerms
from offtower.ops.types import RewardTerms
from offtower.serving import ServedPolicy
from offtower.slates import (
    CANCELLATION,
    Rest,
    conditional_log_prob,
    enumerable,
    padded,
    position_marginals,
    remaining_expected_reward,
    sampled_marginals,
    unpadded,
)

_CELLS = 1 << 20
"""Probabilities of items held at a time."""
_NOTHING = -1
"""Item number beyond a round's last position."""


@dataclass(frozen=True)
class SlateScorer:
    """A batch of R rounds under a served policy.

    served, items: the policy. context: (R, d) embeddings of the rounds' contexts.
    rounds: of the n rows. action: (n,) shown items. eligible: of the R rounds; None is all items.
    """

    served: ServedPolicy
    items: ItemEmbeddings
    context: Tensor
    rounds: Rounds
    action: Tensor
    eligible: Eligibility | None = None

    @property
    def first_action(self) -> Tensor:
        """(R,) items at position 0."""
        return self.action[torch.from_numpy(self.rounds.first).to(self.action.device)]

    def terms(self, reward: RewardTerms | None) -> PolicyTerms:
        """(R,) terms of a single draw; log_prob is that of the item at position 0."""
        return self.served.terms(
            self.context,
            self.items,
            self.first_action,
            reward_model=reward,
            eligible=self.eligible,
        )

    def log_prob(self, log_normalizer: Tensor) -> Tensor:
        """(n,) float64 single-draw log-probabilities of the shown items.

        log_normalizer: (R,) of `terms`.
        """
        shown = self.shown
        filled = torch.where(shown == _NOTHING, shown[:, :1], shown)
        found = self.served.log_prob_at(
            self.context, self.items, filled, log_normalizer, eligible=self.eligible
        )
        return unpadded(found, self.rounds)

    def certain_items(self) -> Tensor:
        """(n,) item that mode top_k shows at each row's position; -1 beyond its k items."""
        longest = max(1, self.rounds.longest)
        generator = torch.Generator()  # Nothing is random in this mode.
        shown = self.served.draw(
            self.context, self.items, longest, generator, eligible=self.eligible
        )[0]
        position = torch.from_numpy(self.rounds.position).to(shown.device)
        most = min(self.served.serving.k, self.items.embedding.shape[0])
        found = unpadded(shown, self.rounds)
        return torch.where(position < most, found, torch.full_like(found, _NOTHING))

    def rests(self, log_prob: Tensor, log_normalizer: Tensor) -> SlateRests:
        """The rounds whose shown items leave little mass, and the items that they do not show."""
        mass = padded(log_prob.exp(), self.rounds)
        last = torch.from_numpy(self.rounds.lengths - 1).to(mass.device)[:, None]
        before = mass.sum(1) - mass.gather(1, last)[:, 0]
        few = torch.nonzero(1.0 - before < CANCELLATION)[:, 0]
        return SlateRests(self, few, log_normalizer[few])

    @property
    def shown(self) -> Tensor:
        """(R, K) shown items; -1 beyond a round's last position."""
        return padded(self.action, self.rounds, _NOTHING)


@dataclass(frozen=True)
class SlateRests:
    """Rounds whose shown items hold nearly all mass.

    few: (m,) their numbers. log_normalizer: (m,) of `SlateScorer.terms`.
    """

    scorer: SlateScorer
    few: Tensor
    log_normalizer: Tensor

    def conditional(self, log_prob: Tensor) -> Tensor:
        """(n,) log pi(a_k|x, a_<k), exact in these rounds too; -inf for items that are not served.

        log_prob: (n,) of single draws.
        """
        rounds = self.scorer.rounds
        found = conditional_log_prob(log_prob, rounds)
        rows, own = self._rows()
        if len(own):
            found[rows] = conditional_log_prob(log_prob[rows], own, self._rest(None))
        return found.masked_fill(torch.isneginf(log_prob), -math.inf)

    def expected_reward(
        self, log_prob: Tensor, mean: Tensor, action_reward: Tensor, reward: RewardTerms | None
    ) -> Tensor:
        """(n,) E[q | x, a_<k].

        mean: (R,) expected reward of a single draw. action_reward: (n,) q of the shown items.
        reward: q over all items; None where `mean` is over draws.
        """
        rounds = self.scorer.rounds
        found = remaining_expected_reward(log_prob, mean, action_reward, rounds)
        rows, own = self._rows()
        if len(own) and reward is not None:
            rest = self._rest(reward_of_rows(reward, self.few))
            found[rows] = remaining_expected_reward(
                log_prob[rows], mean[self.few], action_reward[rows], own, rest
            )
        return torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)

    def _rows(self) -> tuple[Tensor, Rounds]:
        rounds, few = self.scorer.rounds, self.few.cpu().numpy()
        rows = torch.from_numpy(rounds.rows_of(few)).to(self.few.device)
        return rows, Rounds.of_lengths(rounds.lengths[few])

    def _rest(self, reward: RewardTerms | None) -> Rest:
        """The items that these rounds do not show."""
        scorer, few = self.scorer, self.few
        return scorer.served.rest(
            scorer.context[few],
            scorer.items,
            scorer.shown[few],
            self.log_normalizer,
            reward_model=reward,
            eligible=None if scorer.eligible is None else scorer.eligible.take(few),
        )


@dataclass(frozen=True)
class ScoredSlates:
    """What a policy makes of the n rows of R rounds.

    conditional: (n,) float64 log pi(a_k|x, a_<k). predictions: by reward model, (n,) each.
    log_normalizer: (R,).
    """

    conditional: Tensor
    predictions: dict[str, ModelPredictions]
    log_normalizer: Tensor

    def certain(self, shown: NDArray[np.bool_]) -> ScoredSlates:
        """The same where a deterministic policy shows the items of the rows `shown` (n,)."""
        rows = torch.from_numpy(shown).to(self.conditional.device)
        found = {name: one.certain(shown) for name, one in self.predictions.items()}
        return replace(self, conditional=self.conditional.masked_fill(rows, 0.0), predictions=found)


def score_slates(
    scorer: SlateScorer,
    rewards: Mapping[str, BatchReward],
    *,
    draws: int,
    generator: torch.Generator | None,
) -> ScoredSlates:
    """Score rounds with several reward models at once; rewards are those of the rounds' contexts.

    Args:
        draws, generator: of the items that some reward models are averaged over.
    """
    if scorer.served.deterministic:
        return _score_certain(scorer, rewards)
    summed = {
        name: reward.terms
        for name, reward in rewards.items()
        if isinstance(reward, CatalogueReward) and not reward.at_draws
    }
    first = next(iter(summed), None)
    terms = scorer.terms(None if first is None else summed[first])
    log_prob = scorer.log_prob(terms.log_normalizer)
    rests = scorer.rests(log_prob, terms.log_normalizer)
    drawn = None
    if len(summed) < len(rewards):
        assert draws > 0 and generator is not None, "draws need a number and a generator"
        drawn, _ = scorer.served.draw(
            scorer.context, scorer.items, draws, generator, eligible=scorer.eligible
        )
    shown = torch.where(scorer.shown == _NOTHING, scorer.shown[:, :1], scorer.shown)
    found = {}
    for name, reward in rewards.items():
        action_reward = unpadded(torch.from_numpy(reward.at(shown)), scorer.rounds)
        action_reward = action_reward.to(log_prob.device)
        if name in summed:
            own = terms if name == first else scorer.terms(summed[name])
            assert own.expected_reward is not None
            mean = own.expected_reward.double()
        else:
            assert drawn is not None
            mean = torch.from_numpy(reward.mean_at(drawn)).to(log_prob.device)
        expected = rests.expected_reward(log_prob, mean, action_reward, summed.get(name))
        found[name] = ModelPredictions(action_reward.cpu().numpy(), expected.cpu().numpy())
    return ScoredSlates(rests.conditional(log_prob), found, terms.log_normalizer)


def _score_certain(scorer: SlateScorer, rewards: Mapping[str, BatchReward]) -> ScoredSlates:
    """Of mode top_k: one item at each position, whatever the items above are."""
    item = scorer.certain_items()
    same = item == scorer.action
    zero = torch.zeros(len(item), dtype=torch.float64, device=item.device)
    grids = [padded(column.clamp_min(0), scorer.rounds, 0) for column in (scorer.action, item)]
    found = {}
    for name, reward in rewards.items():
        own, best = (
            unpadded(torch.from_numpy(reward.at(grid)), scorer.rounds).numpy() for grid in grids
        )
        found[name] = ModelPredictions(own, np.where(item.cpu().numpy() >= 0, best, 0.0))
    normalizer = torch.zeros(len(scorer.rounds), device=item.device)
    return ScoredSlates(zero.masked_fill(~same, -math.inf), found, normalizer)


def in_rounds(rows: EncodedRows) -> bool:
    """Whether rows with marginal pscores are positions of rounds, some of them below others."""
    if rows.pscore_kind is not None or rows.round_id is None or rows.position is None:
        return False
    return bool((rows.position > 0).any())


def position_log_prob(
    served: ServedPolicy,
    items: ItemEmbeddings,
    rows: tuple[Tensor, Tensor, Tensor],
    log_prob: Tensor,
    eligible: Eligibility | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(n,) float64 log-probabilities of the shown items at their positions.

    For marginal pscores: the probability that the item is at its position, whatever the items
    above it are (the independent weights of Li et al., KDD 2018). By enumeration of the items
    above, or over draws of them where these are too many; estimates of the probabilities, not of
    their logarithms, are then unbiased.

    Args:
        rows: context embeddings (n, d), shown items (n,), positions (n,).
        log_prob: (n,) of a single draw, right at position 0.
        generator: of the draws; None takes the same ones in each call.

    Raises:
        OfftowerError: too many orders of earlier items to enumerate, and too many items to draw.
    """
    context, action, position = rows
    found, count = log_prob.double().clone(), items.embedding.shape[0]
    every = torch.arange(count, dtype=torch.int64, device=action.device)
    generator = generator or torch.Generator().manual_seed(0)
    for k in torch.unique(position[position > 0]).tolist():
        index = torch.nonzero(position == k)[:, 0]
        for part in index.split(max(1, _CELLS // count)):
            own = None if eligible is None else eligible.take(part)
            # Any eligible item will do for the normalizer.
            terms = served.terms(context[part], items, action[part], eligible=own)
            all_items = served.log_prob_at(
                context[part],
                items,
                every.expand(len(part), -1),
                terms.log_normalizer,
                eligible=own,
            )
            if enumerable(count, k):
                marginal = position_marginals(all_items, k).gather(1, action[part][:, None])[:, 0]
            else:
                marginal = sampled_marginals(all_items, action[part], k, generator)
            found[part] = marginal.log()
    return found
