"""The fused operators: softmax terms over the whole catalogue without a (rounds, items) array."""

from offtower.ops.cores import (
    available_backends,
    available_instruction_sets,
    backend_status,
)
from offtower.ops.eligibility import bit_counts
from offtower.ops.policy import merge_partials, partial_terms, policy_terms, top_k
from offtower.ops.sampled import sampled_policy_terms
from offtower.ops.softmax_sampling import sample_softmax
from offtower.ops.types import (
    DenseReward,
    Eligibility,
    FactoredReward,
    ItemLists,
    PartialTerms,
    PolicyTerms,
)

__all__ = [
    "DenseReward",
    "Eligibility",
    "FactoredReward",
    "ItemLists",
    "PartialTerms",
    "PolicyTerms",
    "available_backends",
    "available_instruction_sets",
    "backend_status",
    "bit_counts",
    "merge_partials",
    "partial_terms",
    "policy_terms",
    "sample_softmax",
    "sampled_policy_terms",
    "top_k",
]
