"""Terms of a step from the items that it touches: the batch's own and the proposal's draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtower.config import Config
from offtower.data.features import sent
from offtower.models.items import ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.objectives import Objective
from offtower.ops import DenseReward, FactoredReward, PolicyTerms, sampled_policy_terms
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.sampling import PolicyTopK, Proposal, count_items, make_proposal


class ExactAtTimes:
    """Terms from draws that make way for exact ones in every so-manieth step.

    Args:
        exact_every: steps from one exact one to the next; None takes none.
    """

    def __init__(self, exact_every: int | None) -> None:
        self._exact_every = exact_every

    def wants_exact(self, step: int) -> bool:
        """Whether this step takes the exact terms instead."""
        return self._exact_every is not None and step % self._exact_every == 0


@dataclass(frozen=True)
class TouchedItems:
    """What a step draws, and where each draw stands among the distinct items that it touches."""

    item: Tensor
    """(n,) the distinct items, on the CPU; the following are on the policy's device."""
    action: Tensor
    """(B,) logged items."""
    logged: Tensor
    """(B,) their places in `item`."""
    drawn: Tensor
    """(m,) items that were drawn, for all rows."""
    log_proposal: Tensor
    sample_index: Tensor
    """(m,) places of the draws in `item`."""
    exact_item: Tensor | None
    """(B, k) items that each row counts exactly, -1 for none."""
    exact_index: Tensor | None

    def terms(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        *,
        temperature: float,
        reward_model: DenseReward | FactoredReward | None = None,
        entropy: bool = False,
    ) -> PolicyTerms:
        """Estimated terms of a policy, not necessarily the one that learns.

        Args:
            items: the n distinct ones, embedded.
            reward_model: over the whole catalogue.
        """
        embedding, bias = items.embedding, items.bias
        return sampled_policy_terms(
            context_embedding,
            embedding[self.logged],
            self.action,
            embedding,
            self.drawn,
            self.log_proposal,
            temperature=temperature,
            action_bias=None if bias is None else bias[self.logged],
            sampled_bias=bias,
            reward_model=reward_model,
            entropy=entropy,
            sample_index=self.sample_index,
            exact_item=self.exact_item,
            exact_index=self.exact_index,
        )


class SampledTerms(ExactAtTimes):
    """Draws, embeds what was drawn, and estimates the policy's terms.

    Args:
        policy: the policy that learns.
        items: features of the catalogue; only those of touched items are read.
        proposal: what is drawn.
        exact_every: take the exact terms in every so-manieth step.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        items: ItemFeatures,
        proposal: Proposal,
        exact_every: int | None = None,
    ) -> None:
        super().__init__(exact_every)
        self.policy, self.items, self.proposal = policy, items, proposal

    def touched(
        self,
        context_embedding: Tensor,
        action: Tensor,
        seed: int,
        batch_action: Tensor | None = None,
    ) -> TouchedItems:
        """What (B,) rows draw; `seed` is the step's, the same on every worker.

        Draws are made on the CPU, whatever the policy's device: all numbers of items are known
        there, and a GPU draws the same items.

        Args:
            action: (B,) logged items, on the CPU.
            batch_action: logged items of the step over all workers, where that is more than
                `action`.
        """
        logged_items = action if batch_action is None else batch_action
        draws = self.proposal.draw(seed, logged_items, context_embedding)
        parts = [action, draws.item]
        if draws.exact_item is not None:
            parts.append(draws.exact_item.clamp_min(0).reshape(-1))
        item, place = torch.unique(torch.cat(parts), return_inverse=True)
        rows, drawn = len(action), len(draws.item)
        device = self.policy.device
        place = sent(place, device)
        exact = None if draws.exact_item is None else sent(draws.exact_item, device)
        return TouchedItems(
            item,
            sent(action, device),
            place[:rows],
            sent(draws.item, device),
            sent(draws.log_proposal, device),
            place[rows : rows + drawn],
            exact,
            None if exact is None else place[rows + drawn :].view(exact.shape),
        )

    def embed(self, touched: TouchedItems) -> ItemEmbeddings:
        """The distinct items, by the policy's item tower; differentiable."""
        numbers = sent(touched.item, self.policy.device)
        return ItemEmbeddings(*self.policy.item_tower(self.items.at(touched.item), numbers))


def build_proposal(
    config: Config,
    objective: Objective,
    data: PreparedData,
    policy: TwoTowerPolicy,
    progress: Progress,
    shard: ItemFeatures | None = None,
) -> Proposal | None:
    """The configured proposal; None where the terms are exact, or no terms are needed.

    Args:
        shard: features of a part of the catalogue, where only draws of its items are wanted: then
            only those are counted (but `frequency` draws from all) and searched.
    """
    settings = config.sampling
    if objective.proposal is None and config.training.terms == "exact":
        return None
    if not objective.uses_policy:
        return None
    name = objective.proposal or settings.proposal
    # Which items are drawn by frequency takes the counts of all.
    within = (
        None
        if shard is None or name == "frequency"
        else (shard.first, shard.first + shard.num_items)
    )
    counts = (
        count_items(data.train, data.catalogue, progress, within)
        if name in ("frequency", "in_batch", "mixed")
        else None
    )
    top_k = (
        PolicyTopK(
            policy,
            data.items if shard is None else shard,
            k=settings.top_k,
            refresh_steps=settings.refresh_steps,
            seed=config.seed,
            chunk=config.training.item_chunk,
        )
        if name == "top_k"
        else None
    )
    return make_proposal(
        name,
        data.catalogue.num_items,
        num_samples=settings.num_samples,
        counts=counts,
        power=settings.power,
        uniform_share=settings.uniform_share,
        top_k=top_k,
    )
