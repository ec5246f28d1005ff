"""Score logged rows with a policy whose items are sharded over workers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from offtower.config import ServingConfig
from offtower.data.encoding import take, tensor_of, to_tensors
from offtower.data.rows import EncodedRows
from offtower.errors import DataError
from offtower.evaluation.rows import EvaluationRows
from offtower.evaluation.scoring.weighted_rows import weighted_rows
from offtower.models.items import DEFAULT_CHUNK
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import FactoredReward
from offtower.ops.types import RewardTerms
from offtower.serving import ServedPolicy, mix_uniform
from offtower.slates import remaining_expected_reward
from offtower.training.distributed.item_shard import ItemShard
from offtower.training.distributed.sharded_terms import gather_rows, merged_terms
from offtower.training.workers import Workers


class ShardedScorer:
    """Scores rows; every method is collective, with the same rows on every worker.

    Args:
        policy: with tables of the shard; in evaluation mode while it scores.
        shard: this worker's items, embedded once.
        workers: hold the other items.
        item_chunk: items embedded at a time.
        serving: how the policy is served, without `top` and mode top_k.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        shard: ItemShard,
        workers: Workers,
        *,
        item_chunk: int = DEFAULT_CHUNK,
        serving: ServingConfig | None = None,
    ) -> None:
        self._policy, self._shard, self._workers = policy, shard, workers
        self._served = ServedPolicy(policy, serving or ServingConfig())
        self._training = policy.training
        policy.eval()
        with torch.no_grad():
            self._items = policy.embed_items(shard.items, chunk=item_chunk)
        policy.train(self._training)

    @torch.no_grad()
    def score(self, rows: EncodedRows, reward: RewardTerms | None = None) -> EvaluationRows:
        """Like `PolicyScorer.score`; `reward` is over the shard's items, for all rows."""
        if rows.pscore is None:
            raise DataError("off-policy evaluation needs the logged propensities (pscore)")
        assert reward is None or isinstance(reward, FactoredReward), (
            "the setup accepts factored models only"
        )
        self._policy.eval()
        part = self._workers.rows(len(rows))
        device = self._policy.device
        mine = to_tensors(take(rows.context, np.arange(part.start, part.stop)), device)
        context = gather_rows(
            self._policy.embed_contexts(mine), self._workers.counts(len(rows)), self._workers
        )
        action = self._shard.local(tensor_of(rows.action, device))
        items = self._served.items(self._items)
        eligible = self._shard.eligible(rows, device)
        terms = merged_terms(
            context,
            items.embedding,
            items.bias,
            action,
            self._workers,
            temperature=self._served.temperature,
            reward_model=reward,
            eligible=eligible,
        )
        uniform = self._served.serving.uniform
        if uniform > 0.0:
            over_all = merged_terms(
                context.new_zeros(len(context), 1),
                items.embedding.new_zeros(len(items.embedding), 1),
                None,
                action,
                self._workers,
                temperature=1.0,
                reward_model=reward,
                eligible=eligible,
            )
            terms = mix_uniform(terms, over_all, uniform)
        self._policy.train(self._training)
        scored = weighted_rows(rows, terms.log_prob)
        if terms.expected_reward is None or terms.action_reward is None:
            return scored
        expected = terms.expected_reward
        if rows.rounds is not None:
            first = torch.from_numpy(rows.rounds.first).to(expected.device)
            expected = remaining_expected_reward(
                terms.log_prob, expected[first], terms.action_reward, rows.rounds
            )
        return replace(
            scored,
            action_reward=terms.action_reward.double().cpu().numpy(),
            expected_reward=expected.double().cpu().numpy(),
        )
