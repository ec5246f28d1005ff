"""Proposals of the sampled softmax, whose training steps cost O(draws) instead of O(items)."""

from offtower.sampling.alias import AliasTable
from offtower.sampling.item_counts import ItemCounts, count_items
from offtower.sampling.proposal import PROPOSALS, Proposal, StepDraws, make_proposal
from offtower.sampling.top_k import PolicyTopK

__all__ = [
    "PROPOSALS",
    "AliasTable",
    "ItemCounts",
    "PolicyTopK",
    "Proposal",
    "StepDraws",
    "count_items",
    "make_proposal",
]
