"""One step: a batch of logged rows -> the objective's loss, through towers and fused terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.reader import Step
from offtower.models.features import FeatureTensors
from offtower.models.items import DEFAULT_CHUNK, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.objectives import LoggedRows, Objective, ObjectiveValue, Reduction
from offtower.ops import PolicyTerms
from offtower.ops.square_sum import square_sum
from offtower.ops.types import RewardTerms, reward_in
from offtower.training.distributed import ALONE, Workers
from offtower.training.known_policy import KnownPolicy, divergence_of, log_normalizer
from offtower.training.sampled import SampledTerms, TouchedItems


@dataclass(frozen=True)
class StepMeasures:
    """Numbers about the policy on one batch."""

    effective_sample_size: float | None
    """(sum w)^2 / sum w^2 as a share of the batch's rows; None without pscore."""
    largest_weight: float | None
    entropy: float | None
    """Mean entropy of pi(.|x), in nats."""
    divergence: float | None = None
    """Mean KL(pi(.|x) || pi_0(.|x)), in nats; None where no logging policy is known."""


@dataclass(frozen=True)
class StepPlace:
    """Where a step stands in the run: what its draws are a function of."""

    step: int
    """Steps taken before it."""
    seed: int
    """Of the step's draws."""


FIRST_PLACE = StepPlace(0, 0)


class ClusterWeights(Protocol):
    """log of pi(c|x) / pi_0(c|x) for the clusters of a batch's logged items."""

    def __call__(self, batch: Step, context: FeatureTensors, terms: PolicyTerms) -> Tensor:
        """(B,) without gradient; terms: of the policy."""


class StepLoss(Protocol):
    """A batch in, the objective out; the batch's rows may be spread over workers."""

    def loss(
        self, batch: Step, *, measure: bool = False, place: StepPlace = FIRST_PLACE
    ) -> tuple[ObjectiveValue, StepMeasures | None]:
        """The objective over all rows of the step. Gradients of the loss on all workers add up to
        its gradient; the value is the same number on every worker."""

    def measures(self, batch: Step, seed: int = 0) -> StepMeasures:
        """Weights and entropy over all rows of the step."""

    def whole(self, loss: Tensor) -> Tensor:
        """The loss over all rows of the step, from this worker's."""


class TrainingStep:
    """Each worker has its rows of the batch and the whole catalogue; owns no optimiser, no loop.

    Args:
        policy: the policy that learns, its towers in training mode, on the device of the step.
        objective: what is maximised.
        items: features of the whole catalogue, on that device; a reward model's terms too.
        reward_model: for objectives that need one.
        item_chunk: items embedded at a time.
        sampled: terms from draws; None takes exact ones.
        workers: those that share the batch.
        known: the logging policy, for objectives that need the divergence from it.
        cluster_weights: for a policy in two stages.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        objective: Objective,
        items: ItemFeatures,
        reward_model: RewardModel | None,
        item_chunk: int = DEFAULT_CHUNK,
        sampled: SampledTerms | None = None,
        workers: Workers = ALONE,
        known: KnownPolicy | None = None,
        cluster_weights: ClusterWeights | None = None,
    ) -> None:
        self.cluster_weights = cluster_weights
        self.sampled = sampled
        self.known = known if objective.needs_divergence else None
        self.policy = policy
        self.objective = objective
        self.items = items
        self.reward_model = reward_model if objective.needs_reward_model else None
        self.item_chunk = item_chunk
        self.workers = workers

    def loss(
        self, batch: Step, *, measure: bool = False, place: StepPlace = FIRST_PLACE
    ) -> tuple[ObjectiveValue, StepMeasures | None]:
        rows = batch.rows
        over = Reduction(batch.batch_rows, all_reduce=self.workers.sum)
        device = self.policy.device
        context = to_tensors(rows.context, device)
        numbers = row_numbers(batch, device)
        reward = tensor_of(rows.reward, device)
        pscore = None if rows.pscore is None else tensor_of(rows.pscore, device)
        if not self.objective.uses_policy:
            squares: Tensor | None = None
            if self.objective.needs_square_sum:
                action = tensor_of(rows.action, device)
                logit, squares = self._squares(context, action, numbers)
            else:
                item = self.items.at(tensor_of(rows.action))
                logit = self.policy.action_logit(context, item, numbers)
            logged = LoggedRows(reward, pscore=pscore, action_logit=logit, square_sum=squares)
            return self.objective(logged, over), None
        reward_model = (
            None
            if self.reward_model is None
            else self.reward_model.for_training_rows(rows, batch.fold)
        )
        sampled = self.sampled is not None and not self.sampled.wants_exact(place.step)
        terms, divergence = self._terms(
            *(batch, context, numbers, place.seed, reward_model),
            sampled=sampled,
            entropy=measure or self.objective.needs_entropy,
        )
        of_clusters: Tensor | None = None
        if self.cluster_weights is not None:
            of_clusters = self.cluster_weights(batch, context, terms)
        logged = LoggedRows(
            reward,
            terms=terms,
            pscore=pscore,
            log_cluster_weight=of_clusters,
            divergence=divergence,
        )
        value = self.objective(logged, over)
        return value, measured(terms, pscore, self.workers, divergence) if measure else None

    @torch.no_grad()
    def measures(self, batch: Step, seed: int = 0) -> StepMeasures:
        rows, device = batch.rows, self.policy.device
        context, numbers = to_tensors(rows.context, device), row_numbers(batch, device)
        terms, divergence = self._terms(
            *(batch, context, numbers, seed, None), sampled=self.sampled is not None, entropy=True
        )
        pscore = None if rows.pscore is None else tensor_of(rows.pscore, device)
        return measured(terms, pscore, self.workers, divergence)

    def whole(self, loss: Tensor) -> Tensor:
        return self.workers.sum(loss)

    def _squares(
        self, context: FeatureTensors, action: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of the logged items, and sums of all items' squared scores; no temperature."""
        context_embedding = self.policy.context_tower(context, numbers)[0]
        items = self.policy.embed_items(self.items, chunk=self.item_chunk)
        logit = (context_embedding.float() * items.embedding[action].float()).sum(dim=1)
        if items.bias is not None:
            logit = logit + items.bias[action].float()
        return logit, square_sum(context_embedding, items.embedding, items.bias)

    def _terms(
        self,
        batch: Step,
        context: FeatureTensors,
        numbers: Tensor,
        seed: int,
        reward_model: RewardTerms | None,
        *,
        sampled: bool,
        entropy: bool,
    ) -> tuple[PolicyTerms, Tensor | None]:
        """Of this worker's rows; and the divergence from the known policy, where there is one."""
        u = self.policy.embed_contexts(context, numbers)
        action = tensor_of(batch.rows.action, self.policy.device)
        terms_of: Callable[..., PolicyTerms]
        drawn: TouchedItems | None = None
        if sampled:
            assert self.sampled is not None
            everyone = tensor_of(batch.joined.action)
            drawn = self.sampled.touched(u, tensor_of(batch.rows.action), seed, everyone)
            items = self.sampled.embed(drawn)
            terms_of = partial(drawn.terms, temperature=self.policy.temperature)
        else:
            items = self.policy.embed_items(self.items, chunk=self.item_chunk)
            terms_of = partial(self.policy.terms, action=action)
        if reward_model is not None and u.dtype != torch.float32:
            reward_model = reward_in(reward_model, u.dtype)
        if self.known is None:
            return terms_of(u, items, reward_model=reward_model, entropy=entropy), None
        scores = self.known.scores(context, u.dtype)
        against = terms_of(u, items, reward_model=scores, entropy=True)
        if reward_model is None:
            found = replace(against, expected_reward=None, action_reward=None)
        else:
            found = terms_of(u, items, reward_model=reward_model, entropy=entropy)
        return found, divergence_of(against, log_normalizer(scores, action, drawn))


def row_numbers(batch: Step, device: torch.device) -> Tensor:
    """Places of this worker's rows in the batch."""
    return torch.arange(batch.first, batch.first + len(batch.rows), device=device)


def measured(
    terms: PolicyTerms,
    pscore: Tensor | None,
    workers: Workers = ALONE,
    divergence: Tensor | None = None,
) -> StepMeasures:
    """Measures over the rows of all workers."""
    log_prob = terms.log_prob.detach().double()
    sums = log_prob.new_zeros(5)
    sums[0] = len(log_prob)
    if terms.entropy is not None:
        sums[1] = terms.entropy.detach().double().sum()
    if divergence is not None:
        sums[4] = divergence.detach().double().sum()
    if pscore is None:
        sums = workers.sum(sums)
        entropy, far = _mean(terms.entropy, sums, 1), _mean(divergence, sums, 4)
        return StepMeasures(None, None, entropy, far)
    log_weight = log_prob - pscore.double().log()
    largest = log_prob.new_full((1,), float("-inf"))
    if len(log_weight):
        largest[0] = log_weight.max()
    largest = workers.maximum(largest)
    # The share is unchanged by a common factor, and then nothing overflows.
    scaled = torch.exp(log_weight - largest)
    sums[2], sums[3] = scaled.sum(), scaled.square().sum()
    sums = workers.sum(sums)
    share = float(sums[2].square() / sums[3] / sums[0])
    entropy, far = _mean(terms.entropy, sums, 1), _mean(divergence, sums, 4)
    return StepMeasures(share, float(largest.exp()), entropy, far)


def _mean(per_row: Tensor | None, sums: Tensor, place: int) -> float | None:
    return None if per_row is None else float(sums[place] / sums[0])
