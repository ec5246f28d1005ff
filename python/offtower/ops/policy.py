"""`policy_terms`, its partial results over slices of items, and `top_k`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops.backends import check_backend, core_of
from offtower.ops.categorical import draw_categorical
from offtower.ops.checks import check_action, check_embeddings, check_reward, under_autocast
from offtower.ops.library import policy_terms_op
from offtower.ops.reference import CELLS_AT_ONCE, Inputs, RunningSums, running_sums
from offtower.ops.types import Backend, DenseReward, FactoredReward, PolicyTerms, RewardTerms


def policy_terms(
    context_embedding: Tensor,
    item_embedding: Tensor,
    action: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    reward_model: RewardTerms | None = None,
    entropy: bool = False,
    backend: Backend = "auto",
) -> PolicyTerms:
    """Per-row terms of the softmax policy with logits s_a = <u, v_a> / temperature + b_a.

    No (B, N) array is held. Differentiable in both embeddings and the bias, through log_prob,
    log_normalizer, expected_reward and entropy; the reward model is frozen. Only gradients that are
    asked for are computed. bfloat16 operands are summed in float32, and their gradients are rounded
    once. The native cores (CPU and CUDA) give the same bits on every run, on the CPU for any number
    of threads too (torch.set_num_threads). On a GPU nothing waits for the device, so actions are
    not looked at beforehand: one at or beyond N gives NaN, a negative one a log_prob of -inf. There
    float32 products are tf32 where torch's own are (`torch.set_float32_matmul_precision("high")`).

    Args:
        context_embedding: u, (B, d), float32, bfloat16 or float64.
        item_embedding: v, (N, d), of the same dtype. Under torch.autocast operands of mixed dtypes
            are brought to float32; equal ones stay as they are.
        action: (B,) int64, the logged item of each row.
        temperature: positive; fold a learned one into u and pass 1.
        item_bias: b, (N,).
        reward_model: q(x, a), for expected_reward and action_reward.
        entropy: compute the entropy too.
        backend: "auto", or one of `available_backends()`.

    Returns:
        Terms of length B, in float32 (float64 for float64 inputs).

    Raises:
        OperatorError: shapes, dtypes or devices do not fit, an action is out of range (its row is
            named), the temperature is not positive and finite, or there are no items.
    """
    context_embedding, item_embedding, item_bias, reward_model = under_autocast(
        context_embedding, item_embedding, item_bias, reward_model
    )
    check_embeddings(context_embedding, item_embedding, temperature, item_bias)
    rows, items = context_embedding.shape[0], item_embedding.shape[0]
    check_action(action, rows, items, context_embedding.device)
    check_backend(backend)
    dense, e, t, c, sigmoid = _parts(reward_model, rows, items, context_embedding)
    log_prob, log_normalizer, expected, action_reward, spread, _, _ = policy_terms_op(
        context_embedding,
        item_embedding,
        action,
        float(temperature),
        item_bias,
        dense,
        e,
        t,
        c,
        sigmoid,
        entropy,
        backend,
    )
    has_reward = reward_model is not None
    return PolicyTerms(
        log_prob=log_prob,
        log_normalizer=log_normalizer,
        expected_reward=expected if has_reward else None,
        action_reward=action_reward.detach() if has_reward else None,
        entropy=spread if entropy else None,
    )


@dataclass(frozen=True)
class PartialTerms:
    """What one slice of the items contributes; slices merge exactly, in any order."""

    sums: RunningSums
    action_logit: Tensor
    """(B,); -inf where the row's action is not in the slice."""
    action_reward: Tensor | None
    """(B,); 0 where the row's action is not in the slice."""

    def merge(self, other: PartialTerms) -> PartialTerms:
        reward = self.action_reward
        if reward is not None and other.action_reward is not None:
            reward = reward + other.action_reward
        return PartialTerms(
            self.sums.merge(other.sums),
            torch.maximum(self.action_logit, other.action_logit),
            reward,
        )

    def finish(self) -> PolicyTerms:
        """Terms of the policy over all merged slices.

        Raises:
            OperatorError: a row's action was in none of them.
        """
        if bool(torch.isinf(self.action_logit).any()):
            row = int(torch.isinf(self.action_logit).nonzero()[0])
            raise OperatorError(f"the action of row {row} is in none of the merged slices")
        return self.terms()

    def terms(self) -> PolicyTerms:
        """As `finish`, without a look at the numbers: where all slices are known to be there."""
        log_normalizer = self.sums.log_normalizer
        return PolicyTerms(
            log_prob=self.action_logit - log_normalizer,
            log_normalizer=log_normalizer,
            expected_reward=self.sums.expected_reward,
            action_reward=self.action_reward,
            entropy=self.sums.entropy,
        )


@torch.no_grad()
def partial_terms(
    context_embedding: Tensor,
    item_embedding: Tensor,
    action: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    reward_model: RewardTerms | None = None,
    entropy: bool = False,
    backend: Backend = "auto",
) -> PartialTerms:
    """Terms of one slice of the items, without gradient.

    Args:
        item_embedding: (n, d), the slice; bias and reward model are of the slice too.
        action: (B,) number inside the slice, or -1 where the row's action lies elsewhere.
        others: as in `policy_terms`.
    """
    check_embeddings(context_embedding, item_embedding, temperature, item_bias)
    rows, items = context_embedding.shape[0], item_embedding.shape[0]
    here = action >= 0
    inside = action.clamp_min(0)
    check_action(inside, rows, items, context_embedding.device)
    dense, e, t, c, sigmoid = _parts(reward_model, rows, items, context_embedding)
    x = Inputs(
        context_embedding,
        item_embedding,
        inside,
        float(temperature),
        item_bias,
        dense,
        e,
        t,
        c,
        sigmoid,
    )
    check_backend(backend)
    core = core_of(backend, x)
    if core is not None:
        return PartialTerms(*core.running_sums(replace(x, action=action), entropy))
    return PartialTerms(
        running_sums(x, entropy),
        x.action_logit().masked_fill(~here, float("-inf")),
        x.action_reward().masked_fill(~here, 0.0) if x.has_reward else None,
    )


def merge_partials(parts: Sequence[PartialTerms]) -> PartialTerms:
    """All slices in one."""
    if not parts:
        raise OperatorError("there are no partial results to merge")
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return merged


@torch.no_grad()
def top_k(
    context_embedding: Tensor,
    item_embedding: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The k items of largest score s_a = <u, v_a> / temperature + b_a.

    Returns:
        scores (B, k), falling, float32 (float64 for float64 operands), and item numbers (B, k)
        int64; ties go to the lowest number. NaN counts as largest.

    Raises:
        OperatorError: as for `policy_terms`, or k is not in [1, N].
    """
    check_embeddings(context_embedding, item_embedding, temperature, item_bias)
    rows, items = context_embedding.shape[0], item_embedding.shape[0]
    if not 1 <= k <= items:
        raise OperatorError(f"k must lie in [1, {items}], the number of items, got {k}")
    x = _logits_only(context_embedding, item_embedding, temperature, item_bias)
    check_backend(backend)
    core = core_of(backend, x, k)
    if core is not None:
        return core.top_k(x, k)
    best: Tensor | None = None
    index: Tensor | None = None
    for start, stop in x.chunks():
        scores = x.logits(start, stop)
        place = torch.arange(start, stop, dtype=torch.int64, device=scores.device).expand(rows, -1)
        if best is not None and index is not None:
            scores, place = torch.cat([best, scores], 1), torch.cat([index, place], 1)
        best, index = _first_k(scores, place, min(k, scores.shape[1]))
    assert best is not None and index is not None
    return best, index


def _first_k(scores: Tensor, place: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, ties to the lowest place; `place` rises along a row.

    torch.topk alone may pick any of equal scores: whatever is above the k-th score is in, and ties
    with it are taken in order.
    """
    threshold = torch.topk(scores, k, dim=1).values[:, -1:]
    above = scores > threshold
    ties = scores == threshold
    room = k - above.sum(1, keepdim=True)
    chosen = above | (ties & (torch.cumsum(ties, 1) <= room))
    column = chosen.nonzero()[:, 1].view(len(scores), k)
    picked = scores.gather(1, column)
    order = torch.argsort(picked, dim=1, descending=True, stable=True)
    return picked.gather(1, order), place.gather(1, column).gather(1, order)


@torch.no_grad()
def sample_softmax(
    context_embedding: Tensor,
    item_embedding: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """Draw items from the softmax policy, exactly, without a (B, N) array.

    Two levels: a tile of items from the tiles' log-sum-exps, then an item inside the tile. Memory
    is O(B N / tile + B tile).

    Args:
        num_samples: s, independent draws a row.
        generator: seeds the draws.

    Returns:
        item numbers (B, s) int64 and their log-probabilities (B, s).

    Raises:
        OperatorError: as for `policy_terms`, or num_samples is below 1.
    """
    check_embeddings(context_embedding, item_embedding, temperature, item_bias)
    if num_samples < 1:
        raise OperatorError(f"num_samples must be at least 1, got {num_samples}")
    rows, items = context_embedding.shape[0], item_embedding.shape[0]
    tile = max(1, round(items**0.5))
    x = _logits_only(context_embedding, item_embedding, temperature, item_bias)
    per_block = max(1, CELLS_AT_ONCE // (items + tile * num_samples))
    drawn: list[tuple[Tensor, Tensor]] = []
    for start in range(0, rows, per_block):
        stop = min(start + per_block, rows)
        block = replace(x, u=x.u[start:stop], action=x.action[start:stop])
        drawn.append(_sample_block(block, tile, num_samples, generator))
    if not drawn:
        empty = torch.empty(0, num_samples, dtype=torch.int64, device=x.u.device)
        return empty, empty.to(x.dtype)
    return torch.cat([i for i, _ in drawn]), torch.cat([p for _, p in drawn])


def _sample_block(
    x: Inputs, tile: int, num_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    items = x.v.shape[0]
    size = max(tile, CELLS_AT_ONCE // max(1, x.u.shape[0]) // tile * tile)
    parts = []
    for start in range(0, items, size):
        s = x.logits(start, min(start + size, items))
        padding = -s.shape[1] % tile
        s = torch.nn.functional.pad(s, (0, padding), value=float("-inf"))
        parts.append(torch.logsumexp(s.view(s.shape[0], -1, tile), dim=2))
    of_tile = torch.cat(parts, 1)
    log_normalizer = torch.logsumexp(of_tile, 1, keepdim=True)
    chosen = draw_categorical(of_tile - log_normalizer, num_samples, generator)
    # (B, s, tile): the items of each drawn tile; those beyond N are masked.
    place = chosen[:, :, None] * tile + torch.arange(tile, dtype=torch.int64, device=chosen.device)
    outside = place >= items
    place = place.clamp_max(items - 1)
    v = x.v[place.view(x.u.shape[0], -1)].to(x.dtype)
    s = torch.bmm(v, x.scaled_context()[:, :, None]).view(place.shape)
    if x.bias is not None:
        s = s + x.bias[place].to(x.dtype)
    s = s.masked_fill(outside, float("-inf"))
    inside = draw_categorical((s - torch.logsumexp(s, 2, keepdim=True)).flatten(0, 1), 1, generator)
    inside = inside.view((*chosen.shape, 1))
    index = place.gather(2, inside)[:, :, 0]
    return index, s.gather(2, inside)[:, :, 0] - log_normalizer


def _parts(
    reward_model: RewardTerms | None, rows: int, items: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool]:
    """A reward model as (dense, e, t, c, sigmoid)."""
    if reward_model is None:
        return None, None, None, None, False
    check_reward(reward_model, rows, items, like)
    if isinstance(reward_model, DenseReward):
        return reward_model.values.detach(), None, None, None, False
    assert isinstance(reward_model, FactoredReward)
    bias = reward_model.item_bias
    return (
        None,
        reward_model.context.detach(),
        reward_model.item.detach(),
        None if bias is None else bias.detach(),
        reward_model.link == "sigmoid",
    )


def _logits_only(
    context_embedding: Tensor, item_embedding: Tensor, temperature: float, item_bias: Tensor | None
) -> Inputs:
    """Operands without logged actions and reward model."""
    action = torch.zeros(
        context_embedding.shape[0], dtype=torch.int64, device=context_embedding.device
    )
    return Inputs(
        context_embedding,
        item_embedding,
        action,
        float(temperature),
        item_bias,
        dense=None,
        e=None,
        t=None,
        c=None,
        sigmoid=False,
    )
