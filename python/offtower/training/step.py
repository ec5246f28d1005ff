"""One step: a batch of logged rows -> the objective's loss, through towers and fused terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtower.data.encoding import to_tensors
from offtower.data.rows import EncodedRows
from offtower.models.features import FeatureTensors
from offtower.models.items import DEFAULT_CHUNK, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.objectives import LoggedRows, Objective, ObjectiveValue, Reduction
from offtower.ops import PolicyTerms
from offtower.training.sampled import SampledTerms


@dataclass(frozen=True)
class StepMeasures:
    """Numbers about the policy on one batch."""

    effective_sample_size: float | None
    """(sum w)^2 / sum w^2 as a share of the batch's rows; None without pscore."""
    largest_weight: float | None
    entropy: float | None
    """Mean entropy of pi(.|x), in nats."""


@dataclass(frozen=True)
class StepPlace:
    """Where a step stands in the run: what its draws are a function of."""

    step: int
    """Steps taken before it."""
    seed: int
    """Of the step's draws."""


FIRST_PLACE = StepPlace(0, 0)


class TrainingStep:
    """Computes losses; owns no optimiser and no loop."""

    def __init__(
        self,
        policy: TwoTowerPolicy,
        objective: Objective,
        items: ItemFeatures,
        reward_model: RewardModel | None,
        item_chunk: int = DEFAULT_CHUNK,
        sampled: SampledTerms | None = None,
    ) -> None:
        self.sampled = sampled
        self.policy = policy
        self.objective = objective
        self.items = items
        self.reward_model = reward_model if objective.needs_reward_model else None
        self.item_chunk = item_chunk

    def loss(
        self,
        rows: EncodedRows,
        fold: int,
        over: Reduction,
        *,
        measure: bool = False,
        place: StepPlace = FIRST_PLACE,
    ) -> tuple[ObjectiveValue, StepMeasures | None]:
        """The batch's objective; with `measure` also weights and entropy where they cost little."""
        context = to_tensors(rows.context)
        action = torch.from_numpy(rows.action)
        reward = torch.from_numpy(rows.reward)
        pscore = None if rows.pscore is None else torch.from_numpy(rows.pscore)
        if not self.objective.uses_policy:
            logit = self.policy.action_logit(context, self.items.at(action))
            return self.objective(LoggedRows(reward, action_logit=logit), over), None
        entropy = measure or self.objective.needs_entropy
        terms = self._terms(rows, context, action, fold, place, entropy=entropy)
        value = self.objective(LoggedRows(reward, terms=terms, pscore=pscore), over)
        return value, _measures(terms, pscore) if measure else None

    @torch.no_grad()
    def measures(self, rows: EncodedRows, seed: int = 0) -> StepMeasures:
        """Weights and entropy on a batch; estimates where the step's terms are sampled."""
        action = torch.from_numpy(rows.action)
        context_embedding = self.policy.embed_contexts(to_tensors(rows.context))
        if self.sampled is not None:
            terms = self.sampled(context_embedding, action, seed, entropy=True)
        else:
            items = self.policy.embed_items(self.items, chunk=self.item_chunk)
            terms = self.policy.terms(context_embedding, items, action, entropy=True)
        pscore = None if rows.pscore is None else torch.from_numpy(rows.pscore)
        return _measures(terms, pscore)

    def _terms(
        self,
        rows: EncodedRows,
        context: FeatureTensors,
        action: Tensor,
        fold: int,
        place: StepPlace,
        *,
        entropy: bool,
    ) -> PolicyTerms:
        context_embedding = self.policy.embed_contexts(context)
        reward_model = (
            None if self.reward_model is None else self.reward_model.for_training_rows(rows, fold)
        )
        if self.sampled is not None and not self.sampled.wants_exact(place.step):
            return self.sampled(
                context_embedding, action, place.seed, reward_model=reward_model, entropy=entropy
            )
        items = self.policy.embed_items(self.items, chunk=self.item_chunk)
        return self.policy.terms(
            context_embedding, items, action, reward_model=reward_model, entropy=entropy
        )


def _measures(terms: PolicyTerms, pscore: Tensor | None) -> StepMeasures:
    entropy = None if terms.entropy is None else float(terms.entropy.detach().mean())
    if pscore is None:
        return StepMeasures(None, None, entropy)
    log_weight = terms.log_prob.detach().double() - pscore.double().log()
    # The share is unchanged by a common factor, and then nothing overflows.
    scaled = torch.exp(log_weight - log_weight.max())
    share = float(scaled.sum().square() / scaled.square().sum() / len(scaled))
    return StepMeasures(share, float(log_weight.max().exp()), entropy)
