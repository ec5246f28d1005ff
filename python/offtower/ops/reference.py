"""The operators in plain torch, chunked over items: the meaning of every other backend.

Logits exist for one chunk of items at a time; running (max, sum, weighted sums) per row merge the
chunks. The backward pass computes the logits again. Accumulation is at least float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CELLS_AT_ONCE = 1 << 22
"""Logits held at a time."""

NO_MASS = -1e4
"""A log-probability whose exponential is exactly 0 in float32 and float64: stands for -inf in
p log p, where 0 * inf would be NaN."""


@dataclass(frozen=True)
class Inputs:
    """Operands of `policy_terms`, with the reward model taken apart.

    u (B, d), v (N, d), action (B,), bias (N,); dense (B, N), or e (B, k), t (N, k), c (N,).
    """

    u: Tensor
    v: Tensor
    action: Tensor
    temperature: float
    bias: Tensor | None
    dense: Tensor | None
    e: Tensor | None
    t: Tensor | None
    c: Tensor | None
    sigmoid: bool

    @property
    def has_reward(self) -> bool:
        return self.dense is not None or self.e is not None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32

    def chunks(self) -> Iterator[tuple[int, int]]:
        items = self.v.shape[0]
        size = max(64, CELLS_AT_ONCE // max(1, self.u.shape[0]))
        for start in range(0, items, size):
            yield start, min(start + size, items)

    def logits(self, start: int, stop: int) -> Tensor:
        """(B, stop - start)."""
        s = self.scaled_context() @ self.v[start:stop].to(self.dtype).T
        return s if self.bias is None else s.add_(self.bias[start:stop].to(self.dtype))

    def rewards(self, start: int, stop: int) -> Tensor:
        """(B, stop - start)."""
        if self.dense is not None:
            return self.dense[:, start:stop].to(self.dtype)
        assert self.e is not None and self.t is not None
        q = self.e.to(self.dtype) @ self.t[start:stop].to(self.dtype).T
        if self.c is not None:
            q = q.add_(self.c[start:stop].to(self.dtype))
        return q.sigmoid_() if self.sigmoid else q

    def scaled_context(self) -> Tensor:
        u = self.u.to(self.dtype)
        return u if self.temperature == 1.0 else u / self.temperature

    def action_logit(self) -> Tensor:
        """(B,)."""
        s = (self.scaled_context() * self.v[self.action].to(self.dtype)).sum(1)
        return s if self.bias is None else s + self.bias[self.action].to(self.dtype)

    def action_reward(self) -> Tensor:
        """(B,)."""
        if self.dense is not None:
            return self.dense.gather(1, self.action[:, None])[:, 0].to(self.dtype)
        assert self.e is not None and self.t is not None
        q = (self.e.to(self.dtype) * self.t[self.action].to(self.dtype)).sum(1)
        if self.c is not None:
            q = q + self.c[self.action].to(self.dtype)
        return q.sigmoid() if self.sigmoid else q


@dataclass(frozen=True)
class RunningSums:
    """Sums over a slice of items, relative to the slice's largest logit; they merge exactly.

    top: max_a s_a.  total: sum exp(s - top).  reward: sum exp(s - top) q.
    centred: sum exp(s - top) (s - top), for the entropy without cancellation.
    """

    top: Tensor
    total: Tensor
    reward: Tensor | None
    centred: Tensor | None

    def relative_to(self, anchor: Tensor) -> RunningSums:
        """The same sums of exp(s - anchor) and (s - anchor); differentiable, in `top` too."""
        scale = torch.exp(self.top - anchor)
        # An empty sum has nothing to move: -inf times 0 would be NaN.
        moved = (self.top - anchor).clamp_min(NO_MASS)
        return RunningSums(
            anchor,
            self.total * scale,
            None if self.reward is None else self.reward * scale,
            None if self.centred is None else scale * (self.centred + self.total * moved),
        )

    def merge(self, other: RunningSums) -> RunningSums:
        # Sums do not depend on what they are relative to, so no gradient goes through it.
        top = torch.maximum(self.top, other.top).detach()
        base = finite_top(top)
        mine, others = self.relative_to(base), other.relative_to(base)
        reward = centred = None
        if mine.reward is not None and others.reward is not None:
            reward = mine.reward + others.reward
        if mine.centred is not None and others.centred is not None:
            centred = mine.centred + others.centred
        return RunningSums(top, mine.total + others.total, reward, centred)

    @property
    def log_normalizer(self) -> Tensor:
        return self.top + self.total.log()

    @property
    def expected_reward(self) -> Tensor | None:
        return None if self.reward is None else self.reward / self.total

    @property
    def entropy(self) -> Tensor | None:
        return None if self.centred is None else self.total.log() - self.centred / self.total


def running_sums(x: Inputs, entropy: bool) -> RunningSums:
    """Sums over all items of `x`."""
    sums: RunningSums | None = None
    for start, stop in x.chunks():
        part = _chunk_sums(x, start, stop, entropy)
        sums = part if sums is None else sums.merge(part)
    assert sums is not None
    return sums


def _chunk_sums(x: Inputs, start: int, stop: int, entropy: bool) -> RunningSums:
    s = x.logits(start, stop)
    top = s.amax(1)
    shifted = s.sub_(finite_top(top)[:, None])
    p = shifted.exp()
    return RunningSums(
        top,
        p.sum(1),
        (p * x.rewards(start, stop)).sum(1) if x.has_reward else None,
        (p * shifted.clamp_min_(NO_MASS)).sum(1) if entropy else None,
    )


def finite_top(top: Tensor) -> Tensor:
    """0 where every item so far is masked: then there is nothing to rescale by."""
    return top.masked_fill(top == float("-inf"), 0.0)


@dataclass(frozen=True)
class Cotangents:
    """Gradients of the loss in each output, (B,) or None where an output was not used."""

    log_prob: Tensor | None
    log_normalizer: Tensor | None
    expected_reward: Tensor | None
    entropy: Tensor | None


def backward(
    x: Inputs,
    sums: tuple[Tensor, Tensor],
    expected_reward: Tensor,
    entropy: Tensor,
    g: Cotangents,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in u, v and bias; only those that `needs` names are computed.

    `sums` holds an anchor near the largest logit of each row, and sum exp(s - anchor), over all
    items of the policy, which may be more than those of `x`; a row whose action is not among them
    has action -1.

    ds_ij = g_l (1[j=a] - pi_ij) + g_lse pi_ij
          + g_m pi_ij (q_ij - m_i) - g_h pi_ij (log pi_ij + h_i)
    """
    need_u, need_v, need_b = needs
    scaled = x.scaled_context()
    du = torch.zeros_like(scaled) if need_u else None
    dv = torch.zeros(x.v.shape, dtype=x.dtype, device=x.v.device) if need_v else None
    db = torch.zeros(x.v.shape[0], dtype=x.dtype, device=x.v.device) if need_b else None
    anchor, total = finite_top(sums[0])[:, None], sums[1]
    log_total = total.log()[:, None]
    base = torch.zeros_like(total)
    if g.log_prob is not None:
        base = base - g.log_prob
    if g.log_normalizer is not None:
        base = base + g.log_normalizer
    if g.expected_reward is not None:
        base = base - g.expected_reward * expected_reward
    if g.entropy is not None:
        base = base - g.entropy * entropy
    for start, stop in x.chunks():
        shifted = x.logits(start, stop).sub_(anchor)
        factor = base[:, None].expand_as(shifted)
        if g.expected_reward is not None:
            factor = factor + g.expected_reward[:, None] * x.rewards(start, stop)
        if g.entropy is not None:
            factor = factor - g.entropy[:, None] * (shifted - log_total).clamp_min(NO_MASS)
        ds = shifted.exp_().mul_(factor / total[:, None])
        if du is not None:
            du.addmm_(ds, x.v[start:stop].to(x.dtype))
        if dv is not None:
            torch.mm(ds.T, scaled, out=dv[start:stop])
        if db is not None:
            torch.sum(ds, 0, out=db[start:stop])
    if g.log_prob is not None:
        here = x.action >= 0
        shown = x.action.clamp_min(0)
        own = g.log_prob.masked_fill(~here, 0.0)
        if du is not None:
            du.addcmul_(own[:, None], x.v[shown].to(x.dtype))
        if dv is not None:
            dv.index_add_(0, shown, own[:, None] * scaled)
        if db is not None:
            db.index_add_(0, shown, own)
    if du is not None and x.temperature != 1.0:
        du.div_(x.temperature)
    return (
        None if du is None else du.to(x.u.dtype),
        None if dv is None else dv.to(x.v.dtype),
        None if db is None or x.bias is None else db.to(x.bias.dtype),
    )
