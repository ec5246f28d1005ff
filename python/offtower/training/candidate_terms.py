"""Exact terms of rows that choose among candidates: only the candidates are embedded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offtower.data.features import to_device
from offtower.models.items import ItemEmbeddings
from offtower.ops import DenseReward, Eligibility, FactoredReward, PolicyTerms, policy_terms
from offtower.ops.types import RewardTerms


@dataclass(frozen=True)
class CandidateItems:
    """The distinct candidates of a batch, and each row's list as indices into them."""

    item: Tensor
    """(n,) distinct items, on the CPU; all other tensors are on the policy's device."""
    action: Tensor
    """(B,) indices of the logged items into `item`."""
    eligible: Eligibility

    @classmethod
    def of(cls, eligible: Eligibility, action: Tensor, device: torch.device) -> CandidateItems:
        """The candidates of a batch.

        Args:
            eligible: candidates alone, on the CPU.
            action: (B,) logged items, on the CPU; each is among its row's candidates.
        """
        assert eligible.candidates is not None, "the caller checks that there are candidates"
        item, lists = eligible.candidates.compact()
        index = torch.searchsorted(item, action)
        local = Eligibility(candidates=lists).map(lambda tensor: to_device(tensor, device))
        return cls(item, to_device(index, device), local)

    def terms(
        self,
        context_embedding: Tensor,
        items: ItemEmbeddings,
        *,
        temperature: float,
        reward_model: RewardTerms | None = None,
        entropy: bool = False,
    ) -> PolicyTerms:
        """Compute the terms of a policy, not necessarily the one in training.

        Args:
            items: the n distinct ones, embedded.
            reward_model: over the whole catalogue.
        """
        return policy_terms(
            context_embedding,
            items.embedding,
            self.action,
            temperature=temperature,
            item_bias=items.bias,
            reward_model=None if reward_model is None else _at(reward_model, self.item),
            entropy=entropy,
            eligible=self.eligible,
        )


def _at(reward: RewardTerms, item: Tensor) -> RewardTerms:
    """The reward model over some items (n,) only."""
    if isinstance(reward, DenseReward):
        return DenseReward(reward.values[:, to_device(item, reward.values.device)])
    item = to_device(item, reward.item.device)
    bias = reward.item_bias
    return FactoredReward(
        reward.context, reward.item[item], None if bias is None else bias[item], link=reward.link
    )
