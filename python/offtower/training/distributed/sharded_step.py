"""One step where each worker has its own items: contexts travel, items stay."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.data.encoding import tensor_of, to_tensors
from offtower.data.features import sent
from offtower.data.reader import Step
from offtower.models.items import DEFAULT_CHUNK
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.factored import FactoredRewardModel
from offtower.objectives import LoggedRows, Objective, ObjectiveValue, Reduction
from offtower.ops import FactoredReward, PolicyTerms
from offtower.training.distributed.item_shard import ItemShard
from offtower.training.distributed.sharded_sampled import ShardedSampledTerms
from offtower.training.distributed.sharded_terms import gather_rows, merged_terms, sum_rows
from offtower.training.distributed.workers import Workers
from offtower.training.step import FIRST_PLACE, StepMeasures, StepPlace, measured, row_numbers


class ShardedStep:
    """Each worker embeds its rows of the batch and its items of the catalogue; with sampled terms,
    those of its items that the step touches.

    After the terms are merged every worker has them for all rows of the batch, and computes the
    same loss: ratio objectives need no sums of their own.

    Args:
        policy: with tables of the shard.
        objective: what is maximised.
        shard: this worker's items.
        reward_model: over the shard's items (`FactoredRewardModel.over`).
        item_chunk: items embedded at a time.
        workers: those that share the step.
        sampled: terms from draws; None takes exact ones.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        objective: Objective,
        shard: ItemShard,
        reward_model: FactoredRewardModel | None,
        workers: Workers,
        item_chunk: int = DEFAULT_CHUNK,
        sampled: ShardedSampledTerms | None = None,
    ) -> None:
        self.sampled = sampled
        self.policy = policy
        self.objective = objective
        self.shard = shard
        self.reward_model = reward_model if objective.needs_reward_model else None
        self.workers = workers
        self.item_chunk = item_chunk

    def loss(
        self, batch: Step, *, measure: bool = False, place: StepPlace = FIRST_PLACE
    ) -> tuple[ObjectiveValue, StepMeasures | None]:
        joined = batch.joined
        over = Reduction(batch.batch_rows)
        reward = tensor_of(joined.reward, self.policy.device)
        pscore = self._pscore(batch)
        if not self.objective.uses_policy:
            logit = self._action_logit(batch)
            return self.objective(LoggedRows(reward, action_logit=logit), over), None
        entropy = measure or self.objective.needs_entropy
        if self.sampled is None or self.sampled.wants_exact(place.step):
            terms = self._exact_terms(batch, entropy=entropy)
        else:
            terms = self._sampled_terms(batch, place.seed, entropy=entropy)
        value = self.objective(LoggedRows(reward, terms=terms, pscore=pscore), over)
        return value, measured(terms, pscore) if measure else None

    @torch.no_grad()
    def measures(self, batch: Step, seed: int = 0) -> StepMeasures:
        if self.sampled is None:
            terms = self._exact_terms(batch, entropy=True, reward=False)
        else:
            terms = self._sampled_terms(batch, seed, entropy=True, reward=False)
        return measured(terms, self._pscore(batch))

    def whole(self, loss: Tensor) -> Tensor:
        return loss

    def _exact_terms(self, batch: Step, *, entropy: bool, reward: bool = True) -> PolicyTerms:
        items = self.policy.embed_items(self.shard.items, chunk=self.item_chunk)
        return merged_terms(
            self._contexts(batch),
            items.embedding,
            items.bias,
            self.shard.local(tensor_of(batch.joined.action, self.policy.device)),
            self.workers,
            temperature=self.policy.temperature,
            reward_model=self._reward(batch) if reward else None,
            entropy=entropy,
        )

    def _sampled_terms(
        self, batch: Step, seed: int, *, entropy: bool, reward: bool = True
    ) -> PolicyTerms:
        assert self.sampled is not None
        return self.sampled(
            self._contexts(batch),
            tensor_of(batch.joined.action),
            seed,
            reward_model=self._reward(batch) if reward else None,
            entropy=entropy,
        )

    def _contexts(self, batch: Step, *, scaled: bool = True) -> Tensor:
        """(B, d) of all rows; without the temperature where not `scaled`."""
        device = self.policy.device
        features, numbers = to_tensors(batch.rows.context, device), row_numbers(batch, device)
        mine = (
            self.policy.embed_contexts(features, numbers)
            if scaled
            else self.policy.context_tower(features, numbers)[0]
        )
        return gather_rows(mine, self._counts(batch), self.workers)

    def _reward(self, batch: Step) -> FactoredReward | None:
        if self.reward_model is None:
            return None
        mine = self.reward_model.for_training_rows(batch.rows, batch.fold)
        return gather_reward(mine, self._counts(batch), self.workers)

    def _action_logit(self, batch: Step) -> Tensor:
        """(B,) <u_i, v_i> + b_i: the items' owners compute their rows, and the sum has all."""
        contexts = self._contexts(batch, scaled=False)
        # On the CPU, which need not wait for what it knows.
        local = self.shard.local(tensor_of(batch.joined.action))
        rows = (local >= 0).nonzero()[:, 0]
        items, mine = self.shard.items.at(local[rows]), sent(rows, self.policy.device)
        embedding, bias = self.policy.item_tower(items, mine)
        own = (contexts[mine] * embedding).sum(dim=1)
        if bias is not None:
            own = own + bias
        return sum_rows(contexts.new_zeros(len(local)).index_put((mine,), own), self.workers)

    def _pscore(self, batch: Step) -> Tensor | None:
        pscore = batch.joined.pscore
        return None if pscore is None else tensor_of(pscore, self.policy.device)

    def _counts(self, batch: Step) -> list[int]:
        return self.workers.counts(batch.batch_rows)


def gather_reward(mine: FactoredReward, counts: list[int], workers: Workers) -> FactoredReward:
    """A reward model over a worker's items, for the rows of all workers."""
    return FactoredReward(
        workers.gather(mine.context, counts), mine.item, mine.item_bias, link=mine.link
    )
