"""Gradients of one slice of the items, where the policy's sums span all slices."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.ops.library import policy_terms_backward
from offtower.ops.policy import checked_operands, with_eligible
from offtower.ops.types import (
    Backend,
    Cotangents,
    Eligibility,
    ForwardStatistics,
    Gradients,
    Needs,
    RewardTerms,
)


@torch.no_grad()
def shard_gradients(
    context_embedding: Tensor,
    item_embedding: Tensor,
    action: Tensor,
    forward: ForwardStatistics,
    g: Cotangents,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    reward_model: RewardTerms | None = None,
    eligible: Eligibility | None = None,
    needs: Needs = Needs(True, True, True),
    backend: Backend = "auto",
) -> Gradients:
    """What one slice adds to the gradients of `policy_terms` over all slices.

    The gradient in u is a sum over slices, of which this is one; those in the slice's own items
    and biases are whole.

    Args:
        context_embedding: (B, d).
        item_embedding: (n, d), the slice; bias and reward model are of the slice too.
        action: (B,) number inside the slice, or -1 where the row's action lies elsewhere.
        forward: (B,) over all slices: an reference_max near each row's largest logit, the sum of
            exp(s - reference_max), and expected_reward and entropy where they have gradients.
        g: gradients of the loss in each term, (B,); None where a term was not used.
        eligible: of the slice, as in `partial_terms`.
        needs: which gradients to compute; that of a bias only where there is one.

    Returns:
        du (B, d), dv (n, d), db (n,); None where not needed.
    """
    x = checked_operands(
        *(context_embedding.detach(), item_embedding.detach(), action, temperature),
        None if item_bias is None else item_bias.detach(),
        reward_model,
    )
    x = with_eligible(x, eligible)
    needs = needs._replace(item_bias=needs.item_bias and item_bias is not None)
    return policy_terms_backward(x, forward, g, needs, backend)
