"""The core in plain torch, chunked over items, for every dtype and device.

Logits exist for one chunk of items at a time; running (max, sum, weighted sums) per row merge the
chunks. The backward pass computes the logits again. Accumulation is at least float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from offtower.ops.eligibility import WORD, ItemMask
from offtower.ops.tiled_draws import DrawSettings, SoftmaxDraws, draw_rows, tile_items
from offtower.ops.types import (
    LOG_PROB_FLOOR,
    Cotangents,
    ForwardResults,
    ForwardStatistics,
    Gradients,
    Needs,
    Operands,
    PartialTerms,
    RewardOperands,
    RunningSums,
    finite_top,
)

MAX_LOGITS = 1 << 22
"""Logits held at a time."""


def chunks(x: Operands) -> Iterator[tuple[int, int]]:
    """Ranges of items whose logits are held at a time; whole words of a bitmap, if there is one."""
    size = max(64, MAX_LOGITS // max(1, x.rows))
    if x.eligible is not None:
        size = size // WORD * WORD
    for start in range(0, x.items, size):
        yield start, min(start + size, x.items)


def scaled_context(x: Operands) -> Tensor:
    """(B, d) u / temperature."""
    u = x.context.to(x.accumulation_dtype)
    return u if x.temperature == 1.0 else u / x.temperature


class Logits:
    """Logits of ranges of items, -inf where an item is not eligible."""

    def __init__(self, x: Operands) -> None:
        self.x, self.dtype = x, x.accumulation_dtype
        self.context = scaled_context(x)
        self.mask = None if x.eligible is None else ItemMask(x.eligible)

    def of(self, start: int, stop: int) -> Tensor:
        """(B, stop - start), a new tensor; `start` is one of `chunks` or a multiple of 64."""
        s = self.context @ self.x.item[start:stop].to(self.dtype).T
        if self.x.item_bias is not None:
            s = s.add_(self.x.item_bias[start:stop].to(self.dtype))
        if self.mask is not None:
            s.masked_fill_(self.mask.ineligible(start, stop, self.x.rows), float("-inf"))
        return s


class ReferenceCore:
    """The meaning of every other core."""

    name = "reference"

    def available(self) -> bool:
        return True

    def status(self) -> str:
        return "available (plain torch)"

    def refusal(self, x: Operands, k: int = 0) -> str:
        return ""

    def forward(self, x: Operands, entropy: bool) -> ForwardResults:
        sums, action_logit = _running_sums(x, entropy)
        log_normalizer = sums.log_normalizer
        if x.eligible is None:
            log_prob = action_logit - log_normalizer
        else:
            # Exactly 0 where one item is eligible.
            log_prob = (action_logit - finite_top(sums.top)) - sums.total.log()

        def given(value: Tensor | None) -> Tensor:
            return sums.total.new_empty(0) if value is None else value

        return ForwardResults(
            log_prob=log_prob,
            log_normalizer=log_normalizer,
            expected_reward=given(sums.expected_reward),
            action_reward=given(_action_reward(x)),
            entropy=given(sums.entropy),
            reference_max=sums.top,
            total=sums.total,
        )

    def partial(self, x: Operands, entropy: bool) -> PartialTerms:
        elsewhere = x.action < 0
        inside = replace(x, action=x.action.clamp_min(0))
        reward = _action_reward(inside)
        sums, action_logit = _running_sums(inside, entropy)
        return PartialTerms(
            sums,
            action_logit.masked_fill(elsewhere, float("-inf")),
            None if reward is None else reward.masked_fill(elsewhere, 0.0),
        )

    def backward(
        self, x: Operands, forward: ForwardStatistics, g: Cotangents, needs: Needs
    ) -> Gradients:
        """ds_ij = g_l (1[j=a] - pi_ij) + g_lse pi_ij
        + g_m pi_ij (q_ij - m_i) - g_h pi_ij (log pi_ij + h_i)
        """
        dtype, scaled = x.accumulation_dtype, scaled_context(x)
        du = torch.zeros_like(scaled) if needs.context else None
        dv = x.item.new_zeros(x.item.shape, dtype=dtype) if needs.item else None
        db = x.item.new_zeros(x.items, dtype=dtype) if needs.item_bias else None
        reference_max, total = finite_top(forward.reference_max)[:, None], forward.total
        log_total = total.log()[:, None]
        base = shared_cotangent(forward, g)
        logits = Logits(x)
        for start, stop in chunks(x):
            shifted = logits.of(start, stop).sub_(reference_max)
            factor = base[:, None].expand_as(shifted)
            if g.expected_reward is not None:
                assert x.reward is not None
                factor = factor + g.expected_reward[:, None] * _rewards(
                    x.reward, start, stop, dtype
                )
            if g.entropy is not None:
                log_pi = (shifted - log_total).clamp_min(LOG_PROB_FLOOR)
                factor = factor - g.entropy[:, None] * log_pi
            ds = shifted.exp_().mul_(factor / total[:, None])
            if du is not None:
                du.addmm_(ds, x.item[start:stop].to(dtype))
            if dv is not None:
                torch.mm(ds.T, scaled, out=dv[start:stop])
            if db is not None:
                torch.sum(ds, 0, out=db[start:stop])
        if g.log_prob is not None:
            target = x.action.clamp_min(0)
            of_target = g.log_prob.masked_fill(x.action < 0, 0.0)
            if du is not None:
                du.addcmul_(of_target[:, None], x.item[target].to(dtype))
            if dv is not None:
                dv.index_add_(0, target, of_target[:, None] * scaled)
            if db is not None:
                db.index_add_(0, target, of_target)
        if du is not None and x.temperature != 1.0:
            du.div_(x.temperature)

        def rounded(gradient: Tensor | None) -> Tensor | None:
            return None if gradient is None else gradient.to(x.context.dtype)

        return Gradients(rounded(du), rounded(dv), rounded(db))

    def top_k(self, x: Operands, k: int) -> tuple[Tensor, Tensor]:
        best: Tensor | None = None
        index: Tensor | None = None
        logits = Logits(x)
        for start, stop in chunks(x):
            scores = logits.of(start, stop)
            items = torch.arange(start, stop, dtype=torch.int64, device=scores.device)
            items = items.expand(x.rows, -1)
            if logits.mask is not None:
                items = items.masked_fill(logits.mask.ineligible(start, stop, x.rows), -1)
            if best is not None and index is not None:
                scores, items = torch.cat([best, scores], 1), torch.cat([index, items], 1)
            best, index = first_k(scores, items, min(k, scores.shape[1]))
        assert best is not None and index is not None
        return best, index

    def draw(self, x: Operands, settings: DrawSettings) -> SoftmaxDraws:
        tile = tile_items(x.items)
        step = max(1, MAX_LOGITS // (x.items + tile * settings.num_samples))
        parts = []
        for start in range(0, x.rows, step):
            rows = slice(start, min(start + step, x.rows))
            block = replace(x, context=x.context[rows], action=x.action[rows])
            if x.eligible is not None:
                row = torch.arange(start, rows.stop, dtype=torch.int64, device=x.context.device)
                block = replace(block, eligible=x.eligible.take(row))
            logit = Logits(block).of(0, x.items)
            parts.append(draw_rows(logit, tile, settings.take(rows)))
        return SoftmaxDraws(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _rewards(reward: RewardOperands, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """(B, stop - start)."""
    if reward.dense is not None:
        return reward.dense[:, start:stop].to(dtype)
    assert reward.context is not None and reward.item is not None
    q = reward.context.to(dtype) @ reward.item[start:stop].to(dtype).T
    if reward.item_bias is not None:
        q = q.add_(reward.item_bias[start:stop].to(dtype))
    return q.sigmoid_() if reward.sigmoid else q


def _action_logit(x: Operands) -> Tensor:
    """(B,)."""
    dtype = x.accumulation_dtype
    s = (scaled_context(x) * x.item[x.action].to(dtype)).sum(1)
    return s if x.item_bias is None else s + x.item_bias[x.action].to(dtype)


def _action_reward(x: Operands) -> Tensor | None:
    """(B,)."""
    reward, dtype = x.reward, x.accumulation_dtype
    if reward is None:
        return None
    if reward.dense is not None:
        return reward.dense.gather(1, x.action[:, None])[:, 0].to(dtype)
    assert reward.context is not None and reward.item is not None
    q = (reward.context.to(dtype) * reward.item[x.action].to(dtype)).sum(1)
    if reward.item_bias is not None:
        q = q + reward.item_bias[x.action].to(dtype)
    return q.sigmoid() if reward.sigmoid else q


def _running_sums(x: Operands, entropy: bool) -> tuple[RunningSums, Tensor]:
    """Sums over all items of `x`, and the logits of the actions."""
    logits = Logits(x)
    sums: RunningSums | None = None
    action_logit = None if x.eligible is not None else _action_logit(x)
    for start, stop in chunks(x):
        s = logits.of(start, stop)
        if x.eligible is not None:
            # The very logits of the sums, so that ineligible actions have -inf.
            inside = (x.action - start).clamp(0, stop - start - 1)
            found = s.gather(1, inside[:, None])[:, 0]
            found = found.masked_fill(inside + start != x.action, float("-inf"))
            action_logit = found if action_logit is None else torch.maximum(action_logit, found)
        part = _chunk_sums(x, s, (start, stop), entropy)
        sums = part if sums is None else sums.merge(part)
    assert sums is not None and action_logit is not None
    return sums, action_logit


def _chunk_sums(x: Operands, s: Tensor, chunk: tuple[int, int], entropy: bool) -> RunningSums:
    """Sums over the items of a chunk with logits `s`, which are overwritten."""
    top = s.amax(1)
    shifted = s.sub_(finite_top(top)[:, None])
    p = shifted.exp()
    reward = None
    if x.reward is not None:
        reward = (p * _rewards(x.reward, *chunk, x.accumulation_dtype)).sum(1)
    centered = (p * shifted.clamp_min_(LOG_PROB_FLOOR)).sum(1) if entropy else None
    return RunningSums(top, p.sum(1), reward, centered)


def first_k(scores: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores and their items, ties to the lowest item; `items` rises along a row.

    torch.topk alone may pick any of equal scores: whatever is above the k-th score is in, and ties
    with it are taken in order. NaN counts as largest, as in torch.topk, and ties with NaN. Items
    of -1 stand for none: they have a score of -inf and come after all others.
    """
    threshold = torch.topk(scores, k, dim=1).values[:, -1:]
    is_nan, all_nan = scores.isnan(), threshold.isnan()
    above = (scores > threshold) | (is_nan & ~all_nan)
    ties = (scores == threshold) | (is_nan & all_nan)
    room = k - above.sum(1, keepdim=True)
    absent = items < 0
    late = ties & absent
    rank = torch.cumsum(ties & ~absent, 1)
    rank = torch.where(late, rank[:, -1:] + torch.cumsum(late, 1), rank)
    chosen = above | (ties & (rank <= room))
    column = chosen.nonzero()[:, 1].view(len(scores), k)
    picked, found = scores.gather(1, column), items.gather(1, column)
    first = torch.argsort((found < 0).byte(), dim=1, stable=True)
    picked, found = picked.gather(1, first), found.gather(1, first)
    order = torch.argsort(picked, dim=1, descending=True, stable=True)
    return picked.gather(1, order), found.gather(1, order)


def shared_cotangent(forward: ForwardStatistics, g: Cotangents) -> Tensor:
    """(B,) the part of ds_ij / pi_ij that is the same for all items j of a row."""
    base = torch.zeros_like(forward.total)
    if g.log_prob is not None:
        base = base - g.log_prob
    if g.log_normalizer is not None:
        base = base + g.log_normalizer
    if g.expected_reward is not None:
        assert forward.expected_reward is not None
        base = base - g.expected_reward * forward.expected_reward
    if g.entropy is not None:
        assert forward.entropy is not None
        base = base - g.entropy * forward.entropy
    return base
