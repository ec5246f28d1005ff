"""A training step in which each worker holds a part of the items."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.features import to_device
from offtower.data.reader import Step
from offtower.data.rows import relative_weights
from offtower.models.items import DEFAULT_CHUNK
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.factored import FactoredRewardModel
from offtower.objectives import ItemScores, LoggedRows, Objective, ObjectiveValue, Reduction
from offtower.ops import FactoredReward, PolicyTerms
from offtower.training.distributed.item_shard import ItemShard
from offtower.training.distributed.sharded_sampled import ShardedSampledTerms
from offtower.training.distributed.sharded_terms import gather_rows, merged_terms, sum_rows
from offtower.training.step import (
    FIRST_STEP,
    StepDiagnostics,
    StepKey,
    TrainingStep,
    compute_diagnostics,
    logged_weight,
    row_numbers,
    slate_rows,
)
from offtower.training.workers import Workers


class ShardedStep(TrainingStep):
    """Each worker embeds its rows of the batch and its items (with sampled terms, those touched).

    Contexts are gathered; items stay. After the terms are merged, every worker has them for all
    rows of the batch and computes the same loss, so ratio objectives need no sums of their own.

    Args:
        policy: with tables of the shard.
        shard: this worker's items.
        reward_model: over the shard's items (`FactoredRewardModel.with_items`).
        item_chunk: items embedded at a time.
        sampled: estimates terms from draws; None computes exact terms.
        owned: parameters that hold the shard's rows.
        mean_row_weight: of the training log, where its rows have weights.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        objective: Objective,
        shard: ItemShard,
        reward_model: FactoredRewardModel | None,
        workers: Workers,
        *,
        item_chunk: int = DEFAULT_CHUNK,
        sampled: ShardedSampledTerms | None = None,
        owned: Sequence[nn.Parameter] = (),
        mean_row_weight: float = 1.0,
    ) -> None:
        super().__init__(
            policy,
            objective,
            reward_model,
            proposal=None if sampled is None else sampled.proposal,
            workers=workers,
            owned=owned,
            mean_row_weight=mean_row_weight,
        )
        self._shard = shard
        self._sampled = sampled
        self._item_chunk = item_chunk

    def loss(
        self, batch: Step, *, diagnose: bool = False, key: StepKey = FIRST_STEP
    ) -> tuple[ObjectiveValue, StepDiagnostics | None]:
        device = self.policy.device
        weight = relative_weights(batch.joined, self.mean_row_weight, device)
        reduction = Reduction(batch.batch_units, row_weight=weight)
        reward = tensor_of(batch.joined.reward, device)
        pscore = self._pscore(batch)
        requirements = self.objective.requirements
        if not requirements.policy_terms:
            logit = self._action_logit(batch)
            return self.objective(LoggedRows(reward, ItemScores(logit)), reduction), None
        terms = self._terms(
            batch,
            None if self._sampled is None or self._sampled.is_exact(key.step) else key.seed,
            self._reward(batch),
            entropy=diagnose or requirements.entropy,
        )
        slates = slate_rows(batch.joined, self.reward_model)
        logged = LoggedRows(reward, terms, pscore, slates=slates)
        value = self.objective(logged, reduction)
        return value, self._diagnostics(batch, terms) if diagnose else None

    @torch.no_grad()
    def diagnostics(self, batch: Step, seed: int = 0) -> StepDiagnostics:
        terms = self._terms(batch, None if self._sampled is None else seed, None, entropy=True)
        return self._diagnostics(batch, terms)

    def _diagnostics(self, batch: Step, terms: PolicyTerms) -> StepDiagnostics:
        return compute_diagnostics(terms, logged_weight(terms, batch.joined, self.policy.device))

    def total_loss(self, loss: Tensor) -> Tensor:
        return loss

    def _terms(
        self,
        batch: Step,
        sample_seed: int | None,
        reward_model: FactoredReward | None,
        *,
        entropy: bool,
    ) -> PolicyTerms:
        """Sampled terms of all rows, or exact ones without `sample_seed`."""
        action = tensor_of(batch.joined.action)
        eligible = self._shard.eligible(batch.joined, self.policy.device)
        if sample_seed is not None:
            assert self._sampled is not None
            return self._sampled(
                self._contexts(batch),
                action,
                sample_seed,
                reward_model=reward_model,
                entropy=entropy,
                eligible=eligible,
            )
        items = self.policy.embed_items(self._shard.items, chunk=self._item_chunk)
        return merged_terms(
            self._contexts(batch),
            items.embedding,
            items.bias,
            self._shard.local(tensor_of(batch.joined.action, self.policy.device)),
            self.workers,
            temperature=self.policy.temperature,
            reward_model=reward_model,
            entropy=entropy,
            eligible=eligible,
        )

    def _contexts(self, batch: Step, *, scaled: bool = True) -> Tensor:
        """(B, d) embeddings of all rows; without the learned temperature if not `scaled`."""
        device = self.policy.device
        features, numbers = to_tensors(batch.rows.context, device), row_numbers(batch, device)
        mine = (
            self.policy.embed_contexts(features, numbers)
            if scaled
            else self.policy.context_tower(features, numbers)[0]
        )
        return gather_rows(mine, self._counts(batch), self.workers)

    def _reward(self, batch: Step) -> FactoredReward | None:
        """The reward model over this worker's items for the rows of all workers."""
        if self.reward_model is None:
            return None
        mine = self.reward_model.for_training_rows(batch.rows, batch.fold)
        assert isinstance(mine, FactoredReward), "the setup accepts factored models only"
        context = self.workers.gather(mine.context, self._counts(batch))
        return FactoredReward(context, mine.item, mine.item_bias, link=mine.link)

    def _action_logit(self, batch: Step) -> Tensor:
        """(B,) <u_i, v_i> + b_i: each worker computes the rows of its items; the sum has all."""
        contexts = self._contexts(batch, scaled=False)
        # On the CPU, so that the host does not wait for a GPU.
        local = self._shard.local(tensor_of(batch.joined.action))
        rows = (local >= 0).nonzero()[:, 0]
        items, mine = self._shard.items.at(local[rows]), to_device(rows, self.policy.device)
        embedding, bias = self.policy.item_tower(items, mine)
        logit = (contexts[mine] * embedding).sum(dim=1)
        if bias is not None:
            logit = logit + bias
        return sum_rows(contexts.new_zeros(len(local)).index_put((mine,), logit), self.workers)

    def _pscore(self, batch: Step) -> Tensor | None:
        pscore = batch.joined.pscore
        return None if pscore is None else tensor_of(pscore, self.policy.device)

    def _counts(self, batch: Step) -> list[int]:
        return self.workers.counts(batch.batch_rows)
