"""Sampled terms of a step: only the logged and the drawn items are embedded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtower.config import Config
from offtower.data.features import to_device
from offtower.models.items import ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.objectives import Objective
from offtower.ops import (
    DenseReward,
    Eligibility,
    FactoredReward,
    PolicyTerms,
    sampled_policy_terms,
)
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.sampling import ItemCounts, PolicyTopK, Proposal, count_items, make_proposal


class PeriodicExact:
    """Sampled terms that are replaced by exact ones every k-th step.

    Args:
        proposal: what is drawn in the other steps.
        exact_every: k; None never computes exact terms.
    """

    def __init__(self, proposal: Proposal, exact_every: int | None) -> None:
        self.proposal = proposal
        self._exact_every = exact_every

    def is_exact(self, step: int) -> bool:
        return self._exact_every is not None and step % self._exact_every == 0


@dataclass(frozen=True)
class TouchedItems:
    """The draws of a step, and the index of each among the n distinct items of the step."""

    item: Tensor
    """(n,) distinct items, on the CPU; all other tensors are on the policy's device."""
    action: Tensor
    """(B,) logged items."""
    logged: Tensor
    """(B,) their indices into `item`."""
    drawn: Tensor
    """(m,) items drawn for all rows."""
    log_proposal: Tensor
    sample_index: Tensor
    """(m,) indices of the draws into `item`."""
    exact_item: Tensor | None
    """(B, k) items that each row counts exactly, -1 for none."""
    exact_index: Tensor | None
    eligible: Eligibility | None = None
    """Draws that a row may not choose do not count in it; the draws' expected counts stay those of
    the whole catalogue, so the sums over eligible items are estimated without bias."""

    def terms(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        *,
        temperature: float,
        reward_model: DenseReward | FactoredReward | None = None,
        entropy: bool = False,
    ) -> PolicyTerms:
        """Estimate the terms of a policy, not necessarily the one in training.

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
            eligible=self.eligible,
        )


class SampledTerms(PeriodicExact):
    """Draws items, embeds them, and estimates the policy's terms.

    Args:
        policy: in training.
        items: features of the catalogue; only those of touched items are read.
        proposal, exact_every: as for `PeriodicExact`.
    """

    def __init__(
        self,
        policy: TwoTowerPolicy,
        items: ItemFeatures,
        proposal: Proposal,
        exact_every: int | None = None,
    ) -> None:
        super().__init__(proposal, exact_every)
        self.policy, self.items = policy, items

    def touched(
        self,
        context_embedding: Tensor,
        action: Tensor,
        seed: int,
        batch_action: Tensor | None = None,
        eligible: Eligibility | None = None,
    ) -> TouchedItems:
        """Draw the items of (B,) rows; `seed` is the step's, the same on every worker.

        Draws are made on the CPU, so that all devices draw the same items.

        Args:
            action: (B,) logged items, on the CPU.
            batch_action: logged items of the step over all workers, if these are not all rows.
            eligible: of the rows, on the policy's device.
        """
        draws = self.proposal.draw(
            seed,
            action if batch_action is None else batch_action,
            context_embedding,
            eligible=eligible,
        )
        parts = [action, draws.item]
        if draws.exact_item is not None:
            parts.append(draws.exact_item.clamp_min(0).reshape(-1))
        item, index = torch.unique(torch.cat(parts), return_inverse=True)
        rows, drawn = len(action), len(draws.item)
        device = self.policy.device
        index = to_device(index, device)
        exact = None if draws.exact_item is None else to_device(draws.exact_item, device)
        return TouchedItems(
            item,
            to_device(action, device),
            index[:rows],
            to_device(draws.item, device),
            to_device(draws.log_proposal, device),
            index[rows : rows + drawn],
            exact,
            None if exact is None else index[rows + drawn :].view(exact.shape),
            eligible,
        )

    def embed(self, touched: TouchedItems) -> ItemEmbeddings:
        """Embed the distinct items; differentiable in the item tower."""
        return embed_some(self.policy, self.items, touched.item)


def embed_some(policy: TwoTowerPolicy, items: ItemFeatures, item: Tensor) -> ItemEmbeddings:
    """Embed the items with numbers (n,), on the CPU; differentiable in the item tower."""
    numbers = to_device(item, policy.device)
    return ItemEmbeddings(*policy.item_tower(items.at(item), numbers))


def build_proposal(
    config: Config,
    objective: Objective,
    data: PreparedData,
    policy: TwoTowerPolicy,
    progress: Progress,
    shard: ItemFeatures | None = None,
    counts: ItemCounts | None = None,
) -> Proposal | None:
    """Build the configured proposal; None where terms are exact or not needed.

    Args:
        shard: features of a part of the catalogue, if only draws of its items are wanted. Then only
            they are counted (except for `frequency`, which draws from all items) and searched.
        counts: of the logged items in the rows of the batches; by default they are those of the
            whole training log.
    """
    settings, requirements = config.sampling, objective.requirements
    if not requirements.policy_terms:
        return None
    if requirements.proposal is None and config.training.terms == "exact":
        return None
    name = requirements.proposal or settings.proposal
    counted_range = (
        None
        if shard is None or name == "frequency"
        else (shard.first, shard.first + shard.num_items)
    )
    if counts is None and name in ("frequency", "in_batch", "mixed"):
        counts = count_items(data.train, data.catalogue, progress, counted_range)
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
