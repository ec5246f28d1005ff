"""Sampled terms with items sharded over workers.

The draws of a step are a function of its seed, so every worker makes all m draws and keeps those of
its items without communication. Contexts are gathered as in `sharded_terms`: 2 B d numbers per
worker, independent of m; sending touched items to the rows would take 2 (m + B) d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.models.policy import TwoTowerPolicy
from offtower.ops import Eligibility, FactoredReward, PolicyTerms
from offtower.ops.sampled_partial import sampled_partial_terms
from offtower.sampling import Proposal
from offtower.training.distributed.item_shard import ItemShard
from offtower.training.distributed.sharded_terms import merge_over_workers
from offtower.training.sampled import PeriodicExact
from offtower.training.workers import Workers


class ShardedSampledTerms(PeriodicExact):
    """Like `training.sampled.SampledTerms`, for all rows of a step and this worker's items.

    Args:
        policy: with tables of the shard.
        shard: this worker's items; only features of touched ones are read.
        proposal: over the whole catalogue; its top-k part searches the shard.
        workers: hold the other items.
        exact_every: as for `PeriodicExact`.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        shard: ItemShard,
        proposal: Proposal,
        workers: Workers,
        exact_every: int | None = None,
    ) -> None:
        super().__init__(proposal, exact_every)
        self.policy, self.shard, self.workers = policy, shard, workers

    def __call__(
        self,
        context_embedding: Tensor,
        action: Tensor,
        seed: int,
        *,
        reward_model: FactoredReward | None = None,
        entropy: bool = False,
        eligible: Eligibility | None = None,
    ) -> PolicyTerms:
        """Return the terms of all rows of the step, the same on every worker; collective.

        Args:
            context_embedding: (B, d) of all rows.
            action: (B,) item numbers in the catalogue, on the CPU, where draws are made.
            seed: the step's, the same on every worker.
            reward_model: over the shard's items, for all rows.
            eligible: of the shard's items, for all rows.
        """
        shard, device = self.shard, context_embedding.device
        draws = self.proposal.draw(seed, action, within=(shard.start, shard.stop))
        local, drawn = shard.local(action), draws.item - shard.start
        exact = self._exact(context_embedding, eligible)
        parts = [local[local >= 0], drawn]
        if exact is not None:
            parts.append(exact[exact >= 0])
        touched = torch.unique(torch.cat(parts))

        def index_of(item: Tensor) -> Tensor:
            return torch.searchsorted(touched, item).to(device)

        embedding, bias = self.policy.item_tower(
            shard.items.at(touched), (touched + shard.start).to(device)
        )
        logged = local.to(device)
        part = sampled_partial_terms(
            context_embedding,
            embedding,
            bias,
            logged,
            index_of(local),
            drawn.to(device),
            draws.log_count.to(device),
            index_of(drawn),
            temperature=self.policy.temperature,
            reward_model=reward_model,
            entropy=entropy,
            exact_item=None if exact is None else exact.to(device),
            exact_index=None if exact is None else index_of(exact),
            eligible=eligible,
        )
        return merge_over_workers(part, logged >= 0, self.workers).terms()

    def _exact(self, context_embedding: Tensor, eligible: Eligibility | None) -> Tensor | None:
        """(B, w) local numbers of the shard's items that each row counts exactly, -1 for none."""
        top_k = self.proposal.top_k
        if top_k is None:
            return None
        score, item = top_k.search(context_embedding.detach(), eligible)
        least = self._least_score(score, min(top_k.wanted, self.shard.num_items))
        item = item.masked_fill(score < least[:, None], -1).cpu()
        # Scores descend along a row, so the items that count come first.
        width = int((item >= 0).sum(dim=1).max()) if len(item) else 0
        return item[:, :width].contiguous()

    def _least_score(self, score: Tensor, k: int) -> Tensor:
        """(B,) k-th largest of a row's scores over all workers.

        Each worker compares the scores of its rows: it receives (R - 1) / R B k numbers, and B more
        are gathered.
        """
        counts = self.workers.counts(len(score))
        wide = min(k, self.shard.per_worker)
        if score.shape[1] < wide:
            # The last worker can have fewer items than requested.
            missing = score.new_full((len(score), wide - score.shape[1]), float("-inf"))
            score = torch.cat([score, missing], dim=1)
        mine = self.workers.exchange(score, counts).transpose(0, 1).flatten(1)
        least = torch.topk(mine, k, dim=1).values[:, -1]
        return self.workers.gather(least, counts)
