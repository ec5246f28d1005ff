"""Sums of one slice of the items for `sampled_policy_terms`, where several workers hold the items.

A draw and the items that may mask it lie in one slice, so masks need no communication; the sums of
slices merge as those of `partial_terms`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.ops.sampled import action_reward_of, eligible_draws
from offtower.ops.sampled_sums import (
    Draws,
    SampleSums,
    exactly_counted,
    make_draws,
    sample_sums,
)
from offtower.ops.types import Eligibility, FactoredReward, PartialTerms, RunningSums


def sampled_partial_terms(
    context_embedding: Tensor,
    item_embedding: Tensor,
    item_bias: Tensor | None,
    action: Tensor,
    action_index: Tensor,
    sampled_item: Tensor,
    log_count: Tensor,
    sample_index: Tensor,
    *,
    temperature: float = 1.0,
    reward_model: FactoredReward | None = None,
    entropy: bool = False,
    exact_item: Tensor | None = None,
    exact_index: Tensor | None = None,
    eligible: Eligibility | None = None,
) -> PartialTerms:
    """Sums of the logged items, the draws and the exactly counted items that lie in the slice.

    Merged over slices whose draws together are m draws of a proposal Q, `finish` gives the terms of
    `sampled_policy_terms` with these draws, gradients included.

    Args:
        context_embedding: u, (B, d), of all rows, float32, bfloat16 or float64.
        item_embedding: (n, d) of distinct items of the slice; n may be 0.
        item_bias: (n,) or None.
        action: (B,) number of each row's logged item in the slice, -1 where it lies elsewhere.
        action_index: (B,) rows of `item_embedding`; read where `action` is not -1.
        sampled_item: (p,) numbers of the slice's draws, of all m.
        log_count: (p,) log(m Q(a)) of each.
        sample_index: (p,) rows of `item_embedding`.
        temperature: positive.
        reward_model: q(x, a) of all rows over the slice's items; frozen.
        entropy: add what the entropy needs.
        exact_item, exact_index: (B, k) items of the slice that each row counts exactly, distinct in
            a row, -1 for none; and rows of `item_embedding` that hold them.
        eligible: of the slice, numbered from its first item; as in `sampled_policy_terms`.

    Returns:
        Sums that are differentiable in u, the item embeddings and biases. The logit and the reward
        of a row whose item lies elsewhere are -inf and 0. A row without any item in the slice has a
        top of -inf.
    """
    dtype = torch.float64 if context_embedding.dtype == torch.float64 else torch.float32
    u, v = context_embedding.to(dtype), item_embedding.to(dtype)
    u = u if temperature == 1.0 else u / temperature
    bias = None if item_bias is None else item_bias.to(dtype)
    log_count = log_count.to(dtype)
    eligible = eligible_draws(eligible, action, sampled_item)
    here = (action >= 0).nonzero()[:, 0]
    index = action_index[here]
    logit = (u[here] * v[index]).sum(dim=1)
    if bias is not None:
        logit = logit + bias[index]
    action_logit = u.new_full((len(u),), float("-inf")).index_put((here,), logit)
    action_reward: Tensor | None = None
    if reward_model is not None:
        found = action_reward_of(
            FactoredReward(
                reward_model.context[here],
                reward_model.item,
                reward_model.item_bias,
                reward_model.link,
            ),
            action[here],
            dtype,
        )
        action_reward = u.new_zeros(len(u)).index_put((here,), found)

    sums = RunningSums(
        action_logit,
        torch.ones_like(action_logit),
        action_reward,
        torch.zeros_like(action_logit) if entropy else None,
    )
    counted_exactly = action[:, None]
    sets: list[Draws] = []
    if exact_item is not None and exact_index is not None and exact_item.numel():
        # No index is valid in an empty slice.
        if len(v):
            sets.append(exactly_counted(exact_item, exact_index, action, dtype, eligible))
        counted_exactly = torch.cat([counted_exactly, exact_item], dim=1)
    if len(sampled_item):
        sets.append(make_draws(sampled_item, log_count, sample_index, counted_exactly, eligible))
    for draws in sets:
        part = sample_sums(u, v, bias, draws, reward_model, entropy)
        sums = sums.merge(_running(part))
    return PartialTerms(sums, action_logit, action_reward)


def _running(part: SampleSums) -> RunningSums:
    """The running sums of a set of draws, relative to the log of its sum."""
    ones = torch.ones_like(part.log_sum)
    return RunningSums(part.log_sum, ones, part.mean_reward, part.mean_log)
