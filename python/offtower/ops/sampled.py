"""`sampled_policy_terms`: estimates of a softmax policy's terms from items drawn by a proposal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops.checks import FLOATS, check_embeddings, check_reward
from offtower.ops.eligibility import WORD
from offtower.ops.eligibility_checks import check_eligible_action, checked_eligibility
from offtower.ops.sampled_sums import Draws, exactly_counted, make_draws, sample_sums
from offtower.ops.types import (
    LOG_PROB_FLOOR,
    DenseReward,
    Eligibility,
    PolicyTerms,
    RewardTerms,
)


def sampled_policy_terms(
    context_embedding: Tensor,
    action_embedding: Tensor,
    action: Tensor,
    sampled_embedding: Tensor,
    sampled_item: Tensor,
    log_proposal: Tensor,
    *,
    temperature: float = 1.0,
    action_bias: Tensor | None = None,
    sampled_bias: Tensor | None = None,
    reward_model: RewardTerms | None = None,
    entropy: bool = False,
    sample_index: Tensor | None = None,
    exact_item: Tensor | None = None,
    exact_index: Tensor | None = None,
    eligible: Eligibility | None = None,
) -> PolicyTerms:
    r"""Estimates of `policy_terms` from m draws of a proposal Q, at O(m) a row in place of O(N).

    The logged item a_i (and each of the row's `exact_item`) is counted exactly, once; every other
    item stands for itself as often as it is drawn, divided by how often that is expected. Draws
    that hit an item counted exactly are masked. With s_a = <u, v_a> / temperature + b_a:

        Z^  = exp s_{a_i} + sum_{draws j != a_i} exp(s_j - log(m Q(j)))
        log_prob         s_{a_i} - log Z^          log_normalizer   log Z^
        expected_reward  (1/Z^) sum exp(s_j - log(m Q(j))) q_j, the logged item included
        entropy          log Z^ - (1/Z^) sum exp(s_j - log(m Q(j))) s_j

    so the gradient of expected_reward is the self-normalized covariance sum_j p^_j (q_j - m^) grad
    s_j. Draws need not be independent: m Q(a) must be the expected number of times that a is drawn.

    Bias and variance: Z^ is unbiased. With V = Var(Z^) / Z^2, for independent draws
    V = (E_Q[(pi/Q)^2; not a_i] - (1 - pi(a_i))^2) / m, log_normalizer is biased by about -V/2 and
    exp(log_prob) by about +pi V; expected_reward, its gradient and entropy are ratio estimates of
    bias and variance O(1/m). All vanish as m grows, and at once when every item is counted exactly.

    Args:
        context_embedding: u, (B, d), float32, bfloat16 or float64.
        action_embedding: (B, d), of the logged items.
        action: (B,) int64 numbers of the logged items in the catalogue.
        sampled_embedding: (m, d), of the draws, shared by all rows; or, with `sample_index`, (n, d)
            of distinct items.
        sampled_item: (m,) int64 numbers of the drawn items in the catalogue; or (B, m), where each
            row has draws of its own.
        log_proposal: log Q of the draws, shaped like `sampled_item`, natural logarithm; +inf takes
            a draw out (padding).
        temperature: positive; fold a learned one into u and pass 1.
        action_bias: b of the logged items, (B,).
        sampled_bias: b of the rows of `sampled_embedding`; given where `action_bias` is.
        reward_model: q(x, a) over the whole catalogue, gathered by item; frozen.
        entropy: estimate the entropy too.
        sample_index: int64, shaped like `sampled_item`: rows of `sampled_embedding`. Needed for
            draws of each row's own.
        exact_item: (B, k) int64 items that each row counts exactly, such as those of largest
            probability; distinct in a row, -1 for none.
        exact_index: (B, k) int64 rows of `sampled_embedding` that hold them.
        eligible: the items that each row may choose. A draw of another item does not count in the
            row; log_proposal stays that of all items, so Z^ over the eligible ones is unbiased. Few
            eligible items mean few draws that count: then exact terms, or `exact_item`, are better.

    Returns:
        Terms of length B, in float32 (float64 for float64 inputs), differentiable in the context,
        action and sampled embeddings and in both biases.

    Raises:
        OperatorError: shapes, dtypes or devices do not fit, a number is out of range, log_proposal
            is NaN or -inf, or there are no draws.

    Source: Bengio and Senecal 2008, "Adaptive importance sampling to accelerate training of a
    neural probabilistic language model"; Sakhi, Rohde and Gilotte 2023, "Fast offline policy
    optimization for large scale recommendation" (AAAI); the positive stays uncorrected, as
    Khrylchenko et al. 2025, "Correcting the LogQ correction", derive.
    """
    _check(
        context_embedding,
        action_embedding,
        action,
        sampled_embedding,
        sampled_item,
        log_proposal,
        temperature,
        action_bias,
        sampled_bias,
        sample_index,
    )
    rows = context_embedding.shape[0]
    if reward_model is not None:
        items = (
            reward_model.values.shape[1]
            if isinstance(reward_model, DenseReward)
            else reward_model.item.shape[0]
        )
        check_reward(reward_model, rows, items, context_embedding)
        _check_range("action", action, 0, items)
        _check_range("sampled_item", sampled_item, 0, items)
    eligible = eligible_draws(eligible, action, sampled_item)
    dtype = torch.float64 if context_embedding.dtype == torch.float64 else torch.float32
    u = context_embedding.to(dtype)
    u = u if temperature == 1.0 else u / temperature
    v = sampled_embedding.to(dtype)
    bias = None if sampled_bias is None else sampled_bias.to(dtype)

    counted_exactly = action[:, None]
    exact: Draws | None = None
    if exact_item is not None:
        exact_item, exact_index = _check_exact(exact_item, exact_index, rows, v.shape[0])
        counted_exactly = torch.cat([counted_exactly, exact_item], dim=1)
        exact = exactly_counted(exact_item, exact_index, action, dtype, eligible)
    log_count = log_proposal.detach().to(dtype) + math.log(sampled_item.shape[-1])
    draws = make_draws(sampled_item, log_count, sample_index, counted_exactly, eligible)

    logit = (u * action_embedding.to(dtype)).sum(dim=1)
    if action_bias is not None:
        logit = logit + action_bias.to(dtype)
    parts = [
        sample_sums(u, v, bias, part, reward_model, entropy)
        for part in (draws, exact)
        if part is not None
    ]
    action_reward = None if reward_model is None else action_reward_of(reward_model, action, dtype)
    logs = torch.stack([logit, *(part.log_sum for part in parts)])
    log_normalizer = torch.logsumexp(logs, dim=0)
    # (sets, B) log share of the logged item and of each set of draws.
    log_share = logs - log_normalizer
    if eligible is not None and action.device.type != "cpu":
        row = torch.arange(rows, dtype=torch.int64, device=action.device)
        log_share = log_share.masked_fill(~eligible.contains(row, action), float("nan"))
    share = log_share.exp()
    expected: Tensor | None = None
    if action_reward is not None:
        expected = share[0] * action_reward
        for weight, part in zip(share[1:], parts, strict=True):
            assert part.mean_reward is not None
            expected = expected + weight * part.mean_reward
    entropies: Tensor | None = None
    if entropy:
        # Average log-probabilities, not logits, so that nothing large cancels.
        entropies = -share[0] * log_share[0]
        for weight, log_weight, part in zip(share[1:], log_share[1:], parts, strict=True):
            assert part.mean_log is not None
            entropies = entropies - weight * (part.mean_log + log_weight.clamp_min(LOG_PROB_FLOOR))
    return PolicyTerms(
        log_prob=log_share[0],
        log_normalizer=log_normalizer,
        expected_reward=expected,
        action_reward=action_reward,
        entropy=entropies,
    )


def eligible_draws(
    eligible: Eligibility | None, action: Tensor, sampled_item: Tensor
) -> Eligibility | None:
    """Checked eligible items of the rows of `action`, (B,) with -1 for one that lies elsewhere."""
    if eligible is None:
        return None
    found = checked_eligibility(eligible, len(action), None, action.device)
    check_eligible_action(found, action, None)
    if found is not None and found.bitmap is not None:
        _check_range("sampled_item", sampled_item, 0, found.bitmap.shape[1] * WORD)
    return found


def action_reward_of(reward_model: RewardTerms, action: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) q(x_i, a_i)."""
    if isinstance(reward_model, DenseReward):
        return reward_model.values.detach().gather(1, action[:, None])[:, 0].to(dtype)
    e, t = reward_model.context.detach().to(dtype), reward_model.item.detach()[action].to(dtype)
    q = (e * t).sum(dim=1)
    if reward_model.item_bias is not None:
        q = q + reward_model.item_bias.detach()[action].to(dtype)
    return q.sigmoid() if reward_model.link == "sigmoid" else q


def _check(
    context_embedding: Tensor,
    action_embedding: Tensor,
    action: Tensor,
    sampled_embedding: Tensor,
    sampled_item: Tensor,
    log_proposal: Tensor,
    temperature: float,
    action_bias: Tensor | None,
    sampled_bias: Tensor | None,
    sample_index: Tensor | None,
) -> None:
    check_embeddings(context_embedding, sampled_embedding, temperature, sampled_bias)
    rows = context_embedding.shape[0]
    if action_embedding.shape != context_embedding.shape:
        raise OperatorError(
            f"action_embedding must have shape {tuple(context_embedding.shape)}, like "
            f"context_embedding, but has {tuple(action_embedding.shape)}"
        )
    for name, tensor in (("action_embedding", action_embedding), ("action_bias", action_bias)):
        if tensor is not None and tensor.dtype != context_embedding.dtype:
            raise OperatorError(
                f"{name} is {tensor.dtype} but context_embedding is {context_embedding.dtype}; "
                "give both one dtype"
            )
    if (action_bias is None) != (sampled_bias is None):
        raise OperatorError(
            "action_bias and sampled_bias belong together: a bias on one side only shifts "
            "the logged items against the sampled ones"
        )
    if action_bias is not None and action_bias.shape != (rows,):
        raise OperatorError(
            f"action_bias must have shape ({rows},), but has {tuple(action_bias.shape)}"
        )
    if action.dtype != torch.int64 or action.shape != (rows,):
        raise OperatorError(
            f"action must be int64 of shape ({rows},), but is {action.dtype} of "
            f"{tuple(action.shape)}"
        )
    if sampled_item.dtype != torch.int64:
        raise OperatorError(f"sampled_item must be int64, but is {sampled_item.dtype}")
    per_row = sampled_item.dim() == 2
    if sampled_item.dim() not in (1, 2) or (per_row and sampled_item.shape[0] != rows):
        raise OperatorError(
            f"sampled_item must have shape (m,), shared by all rows, or ({rows}, m), but has "
            f"{tuple(sampled_item.shape)}"
        )
    if sampled_item.shape[-1] == 0:
        raise OperatorError("there are no draws: sampled_item is empty")
    if log_proposal.shape != sampled_item.shape or log_proposal.dtype not in FLOATS:
        raise OperatorError(
            f"log_proposal must be a float tensor of shape {tuple(sampled_item.shape)}, like "
            f"sampled_item, but is {log_proposal.dtype} of {tuple(log_proposal.shape)}"
        )
    if sample_index is None:
        if per_row:
            raise OperatorError(
                "draws of shape (B, m) need sample_index, the row of sampled_embedding of each draw"
            )
        if sampled_embedding.shape[0] != sampled_item.shape[0]:
            raise OperatorError(
                f"sampled_embedding has {sampled_embedding.shape[0]} rows for "
                f"{sampled_item.shape[0]} draws; give one row a draw, or sample_index"
            )
    else:
        if sample_index.shape != sampled_item.shape or sample_index.dtype != torch.int64:
            raise OperatorError(
                f"sample_index must be int64 of shape {tuple(sampled_item.shape)}, but is "
                f"{sample_index.dtype} of {tuple(sample_index.shape)}"
            )
        _check_range("sample_index", sample_index, 0, sampled_embedding.shape[0])
    if log_proposal.device.type == "cpu" and not bool((log_proposal > float("-inf")).all()):
        where = (~(log_proposal > float("-inf"))).nonzero()[0].tolist()
        raise OperatorError(
            f"log_proposal at {where} is {float(log_proposal[tuple(where)])}: a proposal cannot "
            "draw an item to which it gives probability 0"
        )


def _check_exact(
    item: Tensor, index: Tensor | None, rows: int, embeddings: int
) -> tuple[Tensor, Tensor]:
    if index is None or index.shape != item.shape or item.dim() != 2 or item.shape[0] != rows:
        found = None if index is None else tuple(index.shape)
        raise OperatorError(
            f"exact_item and exact_index must both have shape ({rows}, k), but have "
            f"{tuple(item.shape)} and {found}"
        )
    if item.dtype != torch.int64 or index.dtype != torch.int64:
        raise OperatorError("exact_item and exact_index must be int64")
    _check_range("exact_index", index.masked_fill(item < 0, 0), 0, embeddings)
    return item, index


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Check values on the CPU. Elsewhere this would wait for the device."""
    if values.numel() == 0 or values.device.type != "cpu":
        return
    least, most = (int(x) for x in torch.aminmax(values))
    if least < low or most >= high:
        where = ((values < low) | (values >= high)).nonzero()[0].tolist()
        raise OperatorError(
            f"{name} at {where} is {int(values[tuple(where)])}, out of range [{low}, {high})"
        )
