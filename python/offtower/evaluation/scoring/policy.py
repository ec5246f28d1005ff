"""Importance weights and reward-model predictions of logged rows under a two-tower policy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offtower.config import ServingConfig
from offtower.data.eligible import EligibleRows
from offtower.data.encoding import FeatureEncoding, tensor_of, to_tensors
from offtower.data.rounds import Rounds
from offtower.data.rows import EncodedRows
from offtower.errors import ConfigError, DataError
from offtower.evaluation.rows import Array, EvaluationRows, IntArray, ModelPredictions
from offtower.evaluation.scoring.rewards import BatchReward, CatalogueReward
from offtower.evaluation.scoring.slates import (
    SlateScorer,
    in_rounds,
    position_log_prob,
    score_slates,
)
from offtower.evaluation.scoring.weighted_rows import context_rows, slate_rows, weighted_rows
from offtower.models.items import DEFAULT_CHUNK, ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import Eligibility, PolicyTerms
from offtower.ops.types import RewardTerms
from offtower.serving import ServedPolicy, SharedTerms, served_policy
from offtower.serving.limits import new_items


@dataclass(frozen=True)
class ScoredRows:
    """A batch of n logged rows under one policy.

    Attributes:
        drawn_by: scorer of the policy; None where only its probabilities are known.
        weighted: weights and rewards, without a reward model.
        predictions: by reward model.
        log_normalizer: (n,) of the policy's terms; of slates (R,), one for each round.
        context_embedding: (n, d), of slates (R, d).
        position: (n,) positions of the rows in their rounds; None where the log has none.
        eligible: items that each row could show; None where every item could.
    """

    drawn_by: PolicyScorer | None
    weighted: EvaluationRows
    predictions: dict[str, ModelPredictions]
    log_normalizer: Tensor
    context_embedding: Tensor
    position: Tensor | None = None
    eligible: EligibleRows | None = None

    @property
    def scorer(self) -> PolicyScorer:
        """Of the policy.

        Raises:
            ConfigError: only the policy's probabilities of logged items are known.
        """
        if self.drawn_by is None:
            raise ConfigError(
                "a policy that is given by a column of probabilities cannot be drawn from; this "
                "needs its embeddings (--embeddings)"
            )
        return self.drawn_by

    def eligible_at(self, taken: IntArray) -> Eligibility | None:
        """The eligible items of the rows `taken` (m,), on the policy's device."""
        if self.eligible is None:
            return None
        return self.eligible.take(taken).on(self.scorer.policy.device)

    def log_prob_at(self, item: Tensor, taken: IntArray | None = None) -> Tensor:
        """(m, S) float64 log-probabilities of items (m, S) in the rows `taken`, by default all."""
        if taken is None:
            taken = np.arange(len(self.context_embedding))
        return self.scorer.served.log_prob_at(
            self.context_embedding[taken],
            self.scorer.items,
            item,
            self.log_normalizer[taken],
            eligible=self.eligible_at(taken),
            position=None if self.position is None else self.position[taken],
        )

    def examined(self, factors: Mapping[str, Array | None]) -> ScoredRows:
        """The same with each model's predictions times the factors of the rows' positions."""
        found = {name: one.examined(factors.get(name)) for name, one in self.predictions.items()}
        return replace(self, predictions=found)

    def weighted_by(self, alpha: Array | None) -> ScoredRows:
        """The same with all predictions times (n,) weights of positions, as rewards are."""
        found = {name: one.examined(alpha) for name, one in self.predictions.items()}
        return replace(self, predictions=found)

    def rows(self, model: str | None) -> EvaluationRows:
        """Rows for estimators, with the predictions of `model`, or without any for None."""
        if model is None:
            return self.weighted
        if model not in self.predictions:  # Positions whose pscores leave no doubly robust form.
            return self.weighted
        found = self.predictions[model]
        return replace(
            self.weighted,
            action_reward=found.action_reward,
            expected_reward=found.expected_reward,
        )


@dataclass(frozen=True)
class _Batch:
    """What every policy with the same items reads of a batch, and the terms that they share."""

    rows: EncodedRows
    context: Tensor
    action: Tensor
    eligible: Eligibility | None
    shared: SharedTerms


class Batches:
    """The batch that is scored now; made once for the policies that score it in turn."""

    def __init__(self) -> None:
        self._now: _Batch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Sent without the batch; policies that share this object still do where they arrive."""
        return {"_now": None}

    def of(self, scorer: PolicyScorer, rows: EncodedRows) -> _Batch:
        """The batch of these very rows. scorer: its policy is in evaluation mode."""
        device = scorer.policy.device
        if self._now is None or self._now.rows is not rows:
            first = context_rows(rows)
            self._now = _Batch(
                rows,
                scorer.embed_contexts(first),
                tensor_of(rows.action, device),
                None if first.eligible is None else first.eligible.on(device),
                SharedTerms(),
            )
        return self._now


class PolicyScorer:
    """Scores rows with a frozen policy as it is served; the catalogue is embedded once.

    Args:
        policy: in evaluation mode while it scores.
        items: features of the catalogue that the rows' actions index, or their embeddings.
        item_chunk: items embedded at a time.
        serving: how the policy is served; None is the trained policy itself.
        served_logs: keys, as `EncodedRows.behavior_policy` has them, of logs that this policy
            wrote. Where it is deterministic, it shows in their rows what they say: the best items
            as its index found them.
        new: (N,) bool, the new items; by default found where `serving` limits their share, which
            takes the items' features.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        items: ItemFeatures | ItemEmbeddings,
        item_chunk: int = DEFAULT_CHUNK,
        serving: ServingConfig | None = None,
        served_logs: NDArray[np.uint64] | None = None,
        new: Tensor | None = None,
    ) -> None:
        self.policy = policy
        self.served_logs = served_logs
        self.serving = serving or ServingConfig()
        self._batches = Batches()
        self._training = policy.training
        policy.eval()
        with torch.no_grad():
            self.items: ItemEmbeddings = (
                items
                if isinstance(items, ItemEmbeddings)
                else policy.embed_items(items, chunk=item_chunk)
            )
        policy.train(self._training)
        limits = self.serving.new_items
        if limits is not None and new is None:
            if not isinstance(items, ItemFeatures):
                raise ValueError("limits on new items take the items' features, or the new items")
            new = new_items(limits, policy.item_encoding, items)
        self._new = new

    @property
    def context_encoding(self) -> FeatureEncoding:
        """In which the policy reads rows."""
        return self.policy.context_encoding

    def embed_contexts(self, rows: EncodedRows) -> Tensor:
        """(n, d) embeddings of the rows' contexts."""
        return self.policy.embed_contexts(to_tensors(rows.context, self.policy.device))

    @property
    def served(self) -> ServedPolicy:
        """The distribution that rows are scored with."""
        return served_policy(self.policy, self.serving, self._new)

    def served_as(
        self,
        serving: ServingConfig,
        served_logs: NDArray[np.uint64] | None = None,
        new: Tensor | None = None,
    ) -> Self:
        """A scorer of the same policy served otherwise, with the same embedded items.

        Policies that share items share the pass over them too, batch by batch.

        Args:
            served_logs: of this way to serve.
            new: likewise; by default these items, where the limits are the same.
        """
        if new is None and serving.new_items == self.serving.new_items:
            new = self._new
        # Not copy.copy, which leaves out what a pickle does.
        other = object.__new__(type(self))
        changed = {"serving": serving, "served_logs": served_logs, "_new": new}
        other.__dict__.update(self.__dict__, **changed)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the item tower: the items are embedded already."""
        policy = copy.copy(self.policy)
        policy._modules = {**policy._modules, "item_tower": nn.Identity()}
        return {**self.__dict__, "policy": policy}

    def score(self, rows: EncodedRows, reward: RewardTerms | None = None) -> EvaluationRows:
        """Weights, rewards and reward-model predictions of a batch of logged rows.

        reward: q of `context_rows(rows)` and all items, for DM and DR; None leaves those columns
        out.
        Raises DataError for rows without propensities.
        """
        if reward is None:
            return self.score_models(rows, {}).weighted
        return self.score_models(rows, {"model": CatalogueReward(reward)}).rows("model")

    @torch.no_grad()
    def score_models(
        self,
        rows: EncodedRows,
        rewards: Mapping[str, BatchReward],
        *,
        draws: int = 0,
        generator: torch.Generator | None = None,
    ) -> ScoredRows:
        """Score with several reward models at once.

        Args:
            rows: n rows.
            rewards: reward models on these rows, by name. Each that is summed over the catalogue
                costs one pass over it, the first none; the others are averaged over draws.
            draws: items drawn from the policy for each row. generator: of the draws.

        Raises:
            DataError: the rows have no propensities.
        """
        if rows.pscore is None:
            raise DataError(
                "off-policy evaluation needs the logged propensities: "
                "name their column as 'pscore' in the log's schema"
            )
        if rows.rounds is not None:
            return self._score_slates(rows, rows.rounds, rewards, draws, generator)
        self.policy.eval()
        device = self.policy.device
        batch = self._batches.of(self, rows)
        context, action, eligible = batch.context, batch.action, batch.eligible
        position = None if rows.position is None else tensor_of(rows.position, device)
        served = replace(self.served, shared=batch.shared)
        summed = {
            name: reward.terms
            for name, reward in rewards.items()
            if isinstance(reward, CatalogueReward) and not reward.at_draws
        }
        first = next(iter(summed.values()), None)
        drawn = None
        if len(summed) < len(rewards):
            assert draws > 0 and generator is not None, "draws need a number and a generator"
            terms, drawn = served.terms_and_draws(
                context,
                self.items,
                action,
                draws=draws,
                generator=generator,
                reward_model=first,
                eligible=eligible,
                position=position,
            )
        else:
            terms = served.terms(
                context,
                self.items,
                action,
                reward_model=first,
                eligible=eligible,
                position=position,
            )
        found: dict[str, ModelPredictions] = {}
        for name, reward in rewards.items():
            if name not in summed:
                assert drawn is not None
                found[name] = ModelPredictions(
                    reward.at(action[:, None])[:, 0], reward.mean_at(drawn)
                )
            elif summed[name] is first:
                found[name] = _predictions(terms)
            else:
                other = served.terms(
                    context,
                    self.items,
                    action,
                    reward_model=summed[name],
                    eligible=eligible,
                    position=position,
                )
                found[name] = _predictions(other)
        self.policy.train(self._training)
        log_prob = terms.log_prob
        shown = self._shown(rows)
        if shown is not None:
            log_prob = log_prob.masked_fill(torch.from_numpy(shown).to(device), 0.0)
            found = {name: one.certain(shown) for name, one in found.items()}
        if in_rounds(rows) and not served.deterministic:
            assert position is not None
            log_prob = position_log_prob(
                self.served, self.items, (context, action, position), log_prob, eligible, generator
            )
            found = {}  # The expected rewards are those of a single draw, not of a position.
        weighted = weighted_rows(rows, log_prob)
        return ScoredRows(
            self, weighted, found, terms.log_normalizer, context, position, rows.eligible
        )

    def _score_slates(
        self,
        rows: EncodedRows,
        rounds: Rounds,
        rewards: Mapping[str, BatchReward],
        draws: int,
        generator: torch.Generator | None,
    ) -> ScoredRows:
        """Score whole rounds, with one pass over the catalogue for each round.

        rewards: on the rows of `context_rows`.
        """
        self.policy.eval()
        batch, first = self._batches.of(self, rows), context_rows(rows)
        context = batch.context
        served = replace(self.served, shared=batch.shared)
        scorer = SlateScorer(served, self.items, context, rounds, batch.action, batch.eligible)
        found = score_slates(scorer, rewards, draws=draws, generator=generator)
        self.policy.train(self._training)
        shown = self._shown(rows)
        if shown is not None:
            found = found.certain(shown)
        return ScoredRows(
            self,
            slate_rows(rows, rounds, found.conditional),
            found.predictions if rows.pscore_kind == "conditional" else {},
            found.log_normalizer,
            context,
            eligible=first.eligible,
        )

    def _shown(self, rows: EncodedRows) -> NDArray[np.bool_] | None:
        """(n,) rows of which it is known that the policy shows their item; None for no such."""
        if self.serving.mode != "top_k" or self.served_logs is None or rows.behavior_policy is None:
            return None
        shown = np.isin(rows.behavior_policy, self.served_logs)
        return shown if rows.position is None else shown & (rows.position < self.serving.k)


def _predictions(terms: PolicyTerms) -> ModelPredictions:
    assert terms.action_reward is not None and terms.expected_reward is not None
    return ModelPredictions(
        terms.action_reward.double().cpu().numpy(), terms.expected_reward.double().cpu().numpy()
    )
