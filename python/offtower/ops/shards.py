"""Gradients of one slice of the items, where the policy's sums span all slices."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.ops.library import policy_terms_backward_op
from offtower.ops.policy import _parts
from offtower.ops.types import Backend, PolicyTerms, RewardTerms


@torch.no_grad()
def shard_gradients(
    context_embedding: Tensor,
    item_embedding: Tensor,
    action: Tensor,
    anchor: Tensor,
    total: Tensor,
    terms: PolicyTerms,
    gradients: PolicyTerms,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    reward_model: RewardTerms | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    backend: Backend = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What one slice adds to the gradients of `policy_terms` over all slices.

    The gradient in u is a sum over slices, of which this is one; those in the slice's own items
    and biases are whole.

    Args:
        context_embedding: (B, d).
        item_embedding: (n, d), the slice; bias and reward model are of the slice too.
        action: (B,) number inside the slice, or -1 where the row's action lies elsewhere.
        anchor: (B,) a number near each row's largest logit over all slices.
        total: (B,) sum of exp(s - anchor) over all slices.
        terms: over all slices; expected_reward and entropy are read where they have gradients.
        gradients: of the loss in each term, None where a term was not used; those of
            action_reward are not read.
        needs: which of du, dv and db to compute.

    Returns:
        du (B, d), dv (n, d), db (n,); None where not needed.
    """
    rows, items = context_embedding.shape[0], item_embedding.shape[0]
    dense, e, t, c, sigmoid = _parts(reward_model, rows, items, context_embedding)
    nothing = context_embedding.new_empty(0)
    needs = (needs[0], needs[1], needs[2] and item_bias is not None)
    du, dv, db = policy_terms_backward_op(
        context_embedding.detach(),
        item_embedding.detach(),
        action,
        float(temperature),
        None if item_bias is None else item_bias.detach(),
        dense,
        e,
        t,
        c,
        sigmoid,
        anchor,
        total,
        nothing if terms.expected_reward is None else terms.expected_reward,
        nothing if terms.entropy is None else terms.entropy,
        gradients.log_prob,
        gradients.log_normalizer,
        gradients.expected_reward,
        gradients.entropy,
        *needs,
        backend,
    )
    return (du if needs[0] else None, dv if needs[1] else None, db if needs[2] else None)
