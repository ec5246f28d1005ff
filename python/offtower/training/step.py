"""One training step: a batch of logged rows -> the objective's loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.reader import Step
from offtower.data.rows import EncodedRows, relative_weights
from offtower.models.features import FeatureTensors
from offtower.models.items import DEFAULT_CHUNK, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.objectives import (
    ItemScores,
    LoggedRows,
    Objective,
    ObjectiveValue,
    Reduction,
    SlateRows,
)
from offtower.ops import Eligibility, PolicyTerms
from offtower.ops.square_sum import square_sum
from offtower.ops.types import RewardTerms, reward_in
from offtower.sampling import Proposal
from offtower.slates import conditional_log_prob, slate_weights
from offtower.training.candidate_terms import CandidateItems
from offtower.training.reference_policy import ReferencePolicy, kl_divergence, log_normalizer
from offtower.training.sampled import SampledTerms, TouchedItems, embed_some
from offtower.training.workers import SINGLE_PROCESS, Workers


@dataclass(frozen=True)
class StepDiagnostics:
    """Numbers about the policy on one batch."""

    effective_sample_size: float | None
    """(sum w)^2 / sum w^2 as a share of the batch's rows; None without pscore."""
    largest_weight: float | None
    entropy: float | None
    """Mean entropy of pi(.|x), in nats."""
    divergence: float | None = None
    """Mean KL(pi(.|x) || pi_ref(.|x)) in nats; None without a reference policy."""


@dataclass(frozen=True)
class StepKey:
    """What the random draws of a step are a function of."""

    step: int
    """Steps before it."""
    seed: int


FIRST_STEP = StepKey(0, 0)


class ClusterWeights(Protocol):
    """log of pi(c|x) / pi_0(c|x) for the clusters of a batch's logged items."""

    def __call__(self, batch: Step, context: FeatureTensors, terms: PolicyTerms) -> Tensor:
        """(B,) without gradient, from the policy's `terms`."""


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy with what a step reads to train it."""

    policy: TwoTowerPolicy
    items: ItemFeatures
    """What the item tower embeds, on the policy's device."""
    cluster_weights: ClusterWeights | None = None
    """For two-stage policies."""


class TrainingStep(ABC):
    """The objective's loss on a batch; the batch's rows may be spread over workers.

    Attributes:
        policy: in training, on the device of the step.
        objective: maximized.
        reward_model: None unless the objective requires one.
        proposal: of sampled terms; None for exact terms.
        workers: share every batch.
        owned: parameters of which each worker holds its own rows.
        mean_row_weight: of the training log, where its rows have weights.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        objective: Objective,
        reward_model: RewardModel | None,
        *,
        proposal: Proposal | None,
        workers: Workers,
        owned: Sequence[nn.Parameter] = (),
        mean_row_weight: float = 1.0,
    ) -> None:
        self.mean_row_weight = mean_row_weight
        self.policy = policy
        self.objective = objective
        self.reward_model = reward_model if objective.requirements.reward_model else None
        self.proposal = proposal
        self.workers = workers
        self.owned = tuple(owned)

    @abstractmethod
    def loss(
        self, batch: Step, *, diagnose: bool = False, key: StepKey = FIRST_STEP
    ) -> tuple[ObjectiveValue, StepDiagnostics | None]:
        """Return the objective over all rows of the step, with diagnostics if `diagnose`.

        The gradients of the loss on all workers add up to the whole gradient; the value is the
        same number on every worker.
        """

    @abstractmethod
    def diagnostics(self, batch: Step, seed: int = 0) -> StepDiagnostics:
        """Return weights and entropy over all rows of the step."""

    @abstractmethod
    def total_loss(self, loss: Tensor) -> Tensor:
        """Return the loss over all rows of the step from this worker's part."""


class ReplicatedStep(TrainingStep):
    """A step in which each worker has its rows of the batch and the whole catalogue.

    Args:
        trained: policy and item features.
        reward_model: on the same device; used if the objective requires one.
        item_chunk: items embedded at a time.
        sampled: estimates terms from draws; None computes exact terms.
        reference: used if the objective requires the KL divergence from it.
        mean_row_weight: of the training log, where its rows have weights.
    """

    def __init__(
        self,
        trained: TrainedPolicy,
        objective: Objective,
        reward_model: RewardModel | None,
        *,
        item_chunk: int = DEFAULT_CHUNK,
        sampled: SampledTerms | None = None,
        workers: Workers = SINGLE_PROCESS,
        reference: ReferencePolicy | None = None,
        mean_row_weight: float = 1.0,
    ) -> None:
        super().__init__(
            trained.policy,
            objective,
            reward_model,
            proposal=None if sampled is None else sampled.proposal,
            workers=workers,
            mean_row_weight=mean_row_weight,
        )
        self.reference = reference if objective.requirements.divergence else None
        self.trained = trained
        self._sampled = sampled
        self._item_chunk = item_chunk

    def loss(
        self, batch: Step, *, diagnose: bool = False, key: StepKey = FIRST_STEP
    ) -> tuple[ObjectiveValue, StepDiagnostics | None]:
        rows, requirements = batch.rows, self.objective.requirements
        device = self.policy.device
        row_weight = relative_weights(rows, self.mean_row_weight, device)
        reduction = Reduction(batch.batch_units, self.workers.sum, row_weight)
        context, numbers = to_tensors(rows.context, device), row_numbers(batch, device)
        reward = tensor_of(rows.reward, device)
        pscore = None if rows.pscore is None else tensor_of(rows.pscore, device)
        if not requirements.policy_terms:
            logged = LoggedRows(reward, self._scores(batch, context, numbers), pscore)
            return self.objective(logged, reduction), None
        model = self.reward_model
        sampled = self._sampled is not None and not self._sampled.is_exact(key.step)
        terms, divergence = self._terms(
            *(batch, context, numbers, key.seed),
            None if model is None else model.for_training_rows(rows, batch.fold),
            sampled=sampled,
            entropy=diagnose or requirements.entropy,
        )
        weights = self.trained.cluster_weights
        logged = LoggedRows(
            reward,
            terms,
            pscore,
            divergence=divergence,
            log_cluster_weight=None if weights is None else weights(batch, context, terms),
            slates=slate_rows(rows, model),
        )
        value = self.objective(logged, reduction)
        if not diagnose:
            return value, None
        log_weight = logged_weight(terms, rows, device)
        return value, compute_diagnostics(terms, log_weight, self.workers, divergence)

    @torch.no_grad()
    def diagnostics(self, batch: Step, seed: int = 0) -> StepDiagnostics:
        rows, device = batch.rows, self.policy.device
        context, numbers = to_tensors(rows.context, device), row_numbers(batch, device)
        terms, divergence = self._terms(
            *(batch, context, numbers, seed, None), sampled=self._sampled is not None, entropy=True
        )
        log_weight = logged_weight(terms, rows, device)
        return compute_diagnostics(terms, log_weight, self.workers, divergence)

    def total_loss(self, loss: Tensor) -> Tensor:
        return self.workers.sum(loss)

    def _scores(self, batch: Step, context: FeatureTensors, numbers: Tensor) -> ItemScores:
        """Scores of the logged items and, if required, sums of squared scores over all items."""
        if not self.objective.requirements.square_sum:
            item = self.trained.items.at(tensor_of(batch.rows.action))
            return ItemScores(self.policy.action_logit(context, item, numbers))
        action = tensor_of(batch.rows.action, self.policy.device)
        context_embedding = self.policy.context_tower(context, numbers)[0]
        items = self.policy.embed_items(self.trained.items, chunk=self._item_chunk)
        logit = (context_embedding.float() * items.embedding[action].float()).sum(dim=1)
        if items.bias is not None:
            logit = logit + items.bias[action].float()
        return ItemScores(logit, square_sum(context_embedding, items.embedding, items.bias))

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
        """Terms of this worker's rows, and their divergence from the reference policy if any."""
        u = self.policy.embed_contexts(context, numbers)
        device, sets = self.policy.device, batch.rows.eligible
        action = tensor_of(batch.rows.action, device)
        eligible: Eligibility | None = None
        terms_of: Callable[..., PolicyTerms]
        touched: TouchedItems | CandidateItems | None = None
        if sets is not None and sets.candidates is not None:
            # Few items, so exact terms cost less than draws.
            touched = CandidateItems.of(sets.on(), tensor_of(batch.rows.action), device)
            items = embed_some(self.policy, self.trained.items, touched.item)
            terms_of = partial(touched.terms, temperature=self.policy.temperature)
        elif sampled:
            assert self._sampled is not None
            touched = self._sampled.touched(
                *(u, tensor_of(batch.rows.action), seed, tensor_of(batch.joined.action)),
                None if sets is None else sets.on(device),
            )
            items = self._sampled.embed(touched)
            terms_of = partial(touched.terms, temperature=self.policy.temperature)
        else:
            eligible = None if sets is None else sets.on(device)
            items = self.policy.embed_items(self.trained.items, chunk=self._item_chunk)
            terms_of = partial(self.policy.terms, action=action, eligible=eligible)
        if reward_model is not None and u.dtype != torch.float32:
            reward_model = reward_in(reward_model, u.dtype)
        if self.reference is None:
            return terms_of(u, items, reward_model=reward_model, entropy=entropy), None
        scores = self.reference.scores(context, u.dtype)
        against = terms_of(u, items, reward_model=scores, entropy=True)
        if reward_model is None:
            terms = replace(against, expected_reward=None, action_reward=None)
        else:
            terms = terms_of(u, items, reward_model=reward_model, entropy=entropy)
        return terms, kl_divergence(against, log_normalizer(scores, action, touched, eligible))


def row_numbers(batch: Step, device: torch.device) -> Tensor:
    """Positions of this worker's rows in the batch."""
    return torch.arange(batch.first, batch.first + len(batch.rows), device=device)


def slate_rows(rows: EncodedRows, model: RewardModel | None) -> SlateRows | None:
    """The rounds of rows from a log of slates, with the reward model's factors of positions."""
    if rows.rounds is None:
        return None
    return SlateRows(rows.rounds, None if model is None else model.examination(rows))


def logged_weight(terms: PolicyTerms, rows: EncodedRows, device: torch.device) -> Tensor | None:
    """(B,) float64 logs of importance weights; None without propensities.

    In a slate those of the items down to each position, or of the slate where only its pscore is
    known.
    """
    if rows.pscore is None:
        return None
    log_prob = terms.log_prob.detach().double()
    log_pscore = tensor_of(rows.pscore, device).double().log()
    if rows.rounds is None or rows.pscore_kind is None:
        return log_prob - log_pscore
    conditional = conditional_log_prob(log_prob, rows.rounds)
    weights = slate_weights(conditional, log_pscore, rows.rounds, rows.pscore_kind)
    return weights.slate if weights.cascade is None else weights.cascade


def compute_diagnostics(
    terms: PolicyTerms,
    log_weight: Tensor | None,
    workers: Workers = SINGLE_PROCESS,
    divergence: Tensor | None = None,
) -> StepDiagnostics:
    """Diagnostics over the rows of all workers. log_weight: (B,) of `logged_weight`."""
    log_prob = terms.log_prob.detach().double()
    sums = log_prob.new_zeros(5)
    sums[0] = len(log_prob)
    if terms.entropy is not None:
        sums[1] = terms.entropy.detach().double().sum()
    if divergence is not None:
        sums[4] = divergence.detach().double().sum()
    largest: Tensor | None = None
    if log_weight is not None:
        largest = log_prob.new_full((1,), float("-inf"))
        if len(log_weight):
            largest[0] = log_weight.max()
        largest = workers.maximum(largest)
        # A common factor does not change the effective sample size, and this one cannot overflow.
        scaled = torch.exp(log_weight - largest)
        sums[2], sums[3] = scaled.sum(), scaled.square().sum()
    rows, entropy, weight, square, far = workers.sum(sums).unbind()
    return StepDiagnostics(
        None if largest is None else float(weight.square() / square / rows),
        None if largest is None else float(largest.exp()),
        None if terms.entropy is None else float(entropy / rows),
        None if divergence is None else float(far / rows),
    )
