"""The exact KL divergence from a stored reference policy."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.data.features import to_device
from offtower.models.features import FeatureTensors
from offtower.models.items import DEFAULT_CHUNK, ItemEmbeddings, ItemFeatures
from offtower.models.policy import TwoTowerPolicy
from offtower.ops import Eligibility, FactoredReward, PolicyTerms, policy_terms
from offtower.training.candidate_terms import CandidateItems
from offtower.training.sampled import TouchedItems


class ReferencePolicy:
    r"""The scores s0(x, a) = <u0, v0_a> / tau0 + b0_a of a frozen policy pi_ref.

    KL(pi(.|x) || pi_ref(.|x)) = -H(pi) - E_pi[s0] + log sum_a exp s0. The scores have the form of
    a factored reward model with identity link, so E_pi[s0] is the `expected_reward` of fused terms
    and no (rows, items) array is materialized.
    Source: Jaques et al. 2017, "Sequence tutor"; Ziegler et al. 2019, "Fine-tuning language models
    from human preferences"; Ouyang et al. 2022.

    Args:
        policy: pi_ref; put into evaluation mode and frozen.
        items: features of the catalogue on its device, embedded once: (N, d0) stay in memory.
        chunk: items embedded at a time.
    """

    def __init__(
        self, policy: TwoTowerPolicy, items: ItemFeatures, chunk: int = DEFAULT_CHUNK
    ) -> None:
        self._policy = policy.eval().requires_grad_(False)
        with torch.no_grad():
            self._items = policy.embed_items(items, chunk=chunk)

    @torch.no_grad()
    def scores(self, context: FeatureTensors, dtype: torch.dtype) -> FactoredReward:
        """s0 of the rows' contexts over the whole catalogue, with vectors in `dtype`."""
        embedding = self._policy.embed_contexts(context) / self._policy.temperature
        bias = self._items.bias
        return FactoredReward(
            embedding.to(dtype),
            self._items.embedding.to(dtype),
            None if bias is None else bias.to(dtype),
        )


def kl_divergence(terms: PolicyTerms, log_normalizer: Tensor) -> Tensor:
    """(B,) KL(pi(.|x) || pi_ref(.|x)) in nats, differentiable in pi.

    Args:
        terms: of pi, with entropy, and with the scores of pi_ref as the reward model.
        log_normalizer: (B,) log sum_a exp s0.
    """
    assert terms.expected_reward is not None and terms.entropy is not None
    return log_normalizer - terms.expected_reward - terms.entropy


@torch.no_grad()
def log_normalizer(
    scores: FactoredReward,
    action: Tensor,
    touched: TouchedItems | CandidateItems | None = None,
    eligible: Eligibility | None = None,
) -> Tensor:
    """(B,) log sum_a exp s0 over the items that pi's terms are of.

    With the draws that pi's terms are estimated from, the divergence is that of two policies on the
    drawn items, and never negative.

    Args:
        action: (B,) logged items.
        touched: the draws or candidates; None for terms over the catalogue.
        eligible: of the rows, for terms over the catalogue.
    """
    item, bias = scores.item, scores.item_bias
    if touched is None:
        return policy_terms(
            scores.context, item, action, item_bias=bias, eligible=eligible
        ).log_normalizer
    index = to_device(touched.item, item.device)
    items = ItemEmbeddings(item[index], None if bias is None else bias[index])
    return touched.terms(scores.context, items, temperature=1.0).log_normalizer
