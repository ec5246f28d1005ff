"""Sums over the draws of each row, in bounded memory: the work inside `sampled_policy_terms`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offtower.ops.draw_masks import EligibleDraws, are_eligible, hits_of, rows_of
from offtower.ops.eligibility import Eligibility
from offtower.ops.types import LOG_PROB_FLOOR, DenseReward, RewardTerms

CPU_CHUNK = 1 << 19
"""Logits (or, with draws per row, elements of their embeddings) held at a time: few enough to stay
in a core's cache."""
GPU_CHUNK = 1 << 25
"""The same on a GPU, where few large operations are faster: 128 MiB."""


@dataclass(frozen=True)
class Draws:
    """Draws shared by all rows (m,), or per row (B, m).

    log_count: log of the expected number of times that each draw's item is drawn; +inf for padding.
    index: rows of the embedding matrix; None where draw j is row j.
    masked: draws that do not count: (k, 2) pairs (row, draw), sorted, for shared draws; a (B, m)
        mask for draws per row. Shared draws on a GPU have the row's items (B, k) that do not count,
        because the number of pairs is not known without waiting for the device.
    """

    item: Tensor
    log_count: Tensor
    index: Tensor | None
    masked: Tensor
    eligible: EligibleDraws | None = None
    """Of shared draws; those per row are masked where they are not eligible."""

    @property
    def shared(self) -> bool:
        return self.item.dim() == 1

    @property
    def masked_by_item(self) -> bool:
        return self.shared and self.item.is_cuda


class SampleSums(NamedTuple):
    """Per row, with p_j = exp(s_j - log_count_j) / sum: log of that sum, E_p[q], and E_p[s] minus
    the log of the sum."""

    log_sum: Tensor
    mean_reward: Tensor | None
    mean_log: Tensor | None


def sample_sums(
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    draws: Draws,
    reward_model: RewardTerms | None,
    entropy: bool,
) -> SampleSums:
    """Sum over the draws of each row; differentiable in u (B, d), v (n, d) and bias (n,).

    A row whose draws are all masked has a log_sum of -inf and means of 0.
    """
    log_sum, mean_reward, mean_log = _SampleSums.apply(  # type: ignore[no-untyped-call]
        u, v, bias, draws, reward_model, entropy
    )
    return SampleSums(
        log_sum,
        mean_reward if reward_model is not None else None,
        mean_log if entropy else None,
    )


def exactly_counted(
    exact_item: Tensor,
    exact_index: Tensor,
    action: Tensor,
    dtype: torch.dtype,
    eligible: Eligibility | None = None,
) -> Draws:
    """Items (B, k) that each row counts once, -1 for none, as draws that are expected once.

    The row's logged item is masked, since it is counted separately, and so are ineligible items.
    """
    absent = (exact_item < 0) | (exact_item == action[:, None])
    if eligible is not None:
        absent |= ~are_eligible(exact_item.clamp_min(0), eligible)
    return Draws(
        exact_item.clamp_min(0),
        torch.zeros(exact_item.shape, dtype=dtype, device=exact_item.device),
        exact_index.masked_fill(absent, 0),
        absent,
    )


def make_draws(
    sampled_item: Tensor,
    log_count: Tensor,
    index: Tensor | None,
    counted_exactly: Tensor,
    eligible: Eligibility | None,
) -> Draws:
    """Draws of which those count that are eligible in a row, and not counted exactly (B, k)."""
    masked = hits_of(sampled_item, counted_exactly)
    if eligible is None:
        return Draws(sampled_item, log_count, index, masked)
    if sampled_item.dim() == 2:
        masked |= ~are_eligible(sampled_item, eligible)
        return Draws(sampled_item, log_count, index, masked)
    return Draws(sampled_item, log_count, index, masked, EligibleDraws(eligible, sampled_item))


class _SampleSums(torch.autograd.Function):
    """Closed-form backward; logits are computed again, so that no (B, m) array outlives a chunk.

    dlog_sum/ds = p      dE_p[q]/ds = p (q - E_p[q])      dmean_log/ds = p (s - log_sum - mean_log)
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        draws: Draws,
        reward_model: RewardTerms | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = _Work(u.detach(), v.detach(), None if bias is None else bias.detach(), draws)
        rewards = None if reward_model is None else _Rewards(reward_model, draws, u.dtype)
        log_sum = u.new_empty(u.shape[0])
        mean_reward = u.new_zeros(u.shape[0] if rewards is not None else 0)
        mean_log = u.new_zeros(u.shape[0] if entropy else 0)
        for rows in work.chunks():
            logits = work.logits(rows)
            top = _finite(logits.amax(dim=1))
            p = torch.exp(logits - top[:, None]) if entropy else logits.sub_(top[:, None]).exp_()
            total = p.sum(dim=1)
            log_sum[rows] = top + total.log()
            # Where nothing counts, 0 / 1 and not 0 / 0.
            divisor = total.masked_fill(total == 0, 1.0)
            if rewards is not None:
                mean_reward[rows] = (p * rewards.of(rows)).sum(dim=1) / divisor
            if entropy:
                logs = work.uncorrected(logits, rows).sub_(_finite(log_sum[rows])[:, None])
                mean_log[rows] = (p * logs.clamp_min_(LOG_PROB_FLOOR)).sum(dim=1) / divisor
        ctx.draws, ctx.rewards = draws, rewards
        ctx.save_for_backward(u, v, bias, log_sum, mean_reward, mean_log)
        ctx.set_materialize_grads(False)
        return log_sum, mean_reward, mean_log

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        g_sum, g_reward, g_log = gradients
        u, v, bias, log_sum, mean_reward, mean_log = ctx.saved_tensors
        rewards: _Rewards | None = ctx.rewards
        need_u, need_v, need_b = ctx.needs_input_grad[:3]
        if rewards is None:
            g_reward = None
        if mean_log.numel() == 0:
            g_log = None
        work = _Work(u, v, bias, ctx.draws)
        base = torch.zeros_like(log_sum)
        if g_sum is not None:
            base = base + g_sum
        if g_reward is not None:
            base = base - g_reward * mean_reward
        if g_log is not None:
            base = base - g_log * mean_log
        du = torch.empty_like(u) if need_u else None
        dv = torch.zeros_like(v) if need_v else None
        db = torch.zeros_like(bias) if need_b and bias is not None else None
        finite = _finite(log_sum)
        for rows in work.chunks():
            logits = work.logits(rows).sub_(finite[rows][:, None])
            factor: Tensor | None = None
            if g_reward is not None and rewards is not None:
                factor = base[rows][:, None] + g_reward[rows][:, None] * rewards.of(rows)
            if g_log is not None:
                logs = work.uncorrected(logits, rows).clamp_min_(LOG_PROB_FLOOR)
                logs = logs.mul_(g_log[rows][:, None])
                factor = logs.add_(base[rows][:, None] if factor is None else factor)
            p = logits.exp_()
            ds = p.mul_(base[rows][:, None]) if factor is None else p.mul_(factor)
            work.accumulate(ds, rows, du, dv, db)
        return du, dv, db, None, None, None


class _Work:
    """Logits of a chunk of rows, and the gradients of a chunk."""

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None, draws: Draws) -> None:
        self.u, self.v, self.draws = u, v, draws
        self.padding = torch.isinf(draws.log_count)
        if draws.shared:
            self.drawn = v if draws.index is None else v[draws.index]
            drawn_bias = bias if bias is None or draws.index is None else bias[draws.index]
            # (m,) added to every row's logits.
            self.shift = -draws.log_count if drawn_bias is None else drawn_bias - draws.log_count
        self.bias = bias
        # Padding is -inf by `shift`; here it must not become inf - inf.
        self.offset = draws.log_count.masked_fill(self.padding, 0.0)

    def chunks(self) -> Iterator[slice]:
        rows, draws = self.u.shape[0], self.draws.item.shape[-1]
        cells = draws if self.draws.shared else draws * max(1, self.u.shape[1])
        most = GPU_CHUNK if self.u.is_cuda else CPU_CHUNK
        step = max(1, most // max(1, cells))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def logits(self, rows: slice) -> Tensor:
        """(rows, m) s_j - log_count_j; -inf where a draw does not count."""
        draws = self.draws
        if draws.shared:
            s = torch.addmm(self.shift, self.u[rows], self.drawn.T)
            if draws.masked_by_item:
                for item in draws.masked[rows].unbind(dim=1):
                    s.masked_fill_(draws.item == item[:, None], float("-inf"))
            else:
                s[rows_of(draws.masked, rows)] = float("-inf")
            if draws.eligible is not None:
                s.masked_fill_(draws.eligible.refused(rows), float("-inf"))
            return s
        assert draws.index is not None
        index = draws.index[rows]
        s = torch.bmm(self.v[index], self.u[rows][:, :, None])[:, :, 0]
        if self.bias is not None:
            s = s + self.bias[index]
        return s.sub_(draws.log_count[rows]).masked_fill_(draws.masked[rows], float("-inf"))

    def uncorrected(self, logits: Tensor, rows: slice) -> Tensor:
        """A new tensor of logits with the proposal's correction taken back."""
        return logits + (self.offset if self.draws.shared else self.offset[rows])

    def accumulate(
        self, ds: Tensor, rows: slice, du: Tensor | None, dv: Tensor | None, db: Tensor | None
    ) -> None:
        draws = self.draws
        if draws.shared and draws.index is None:
            if du is not None:
                torch.mm(ds, self.drawn, out=du[rows])
            if dv is not None:
                dv.addmm_(ds.T, self.u[rows])
            if db is not None:
                db.add_(ds.sum(dim=0))
            return
        if draws.shared:
            assert draws.index is not None
            if du is not None:
                torch.mm(ds, self.drawn, out=du[rows])
            if dv is not None:
                dv.index_add_(0, draws.index, ds.T @ self.u[rows])
            if db is not None:
                db.index_add_(0, draws.index, ds.sum(dim=0))
            return
        assert draws.index is not None
        index = draws.index[rows]
        if du is not None:
            du[rows] = torch.bmm(ds[:, None, :], self.v[index])[:, 0, :]
        if dv is not None:
            part = ds[:, :, None] * self.u[rows][:, None, :]
            dv.index_add_(0, index.reshape(-1), part.flatten(0, 1))
        if db is not None:
            db.index_add_(0, index.reshape(-1), ds.reshape(-1))


class _Rewards:
    """q(x_i, a_j) of a chunk of rows and their draws; catalogue-wide parts are gathered once."""

    def __init__(self, reward_model: RewardTerms, draws: Draws, dtype: torch.dtype) -> None:
        self.model, self.draws, self.dtype = reward_model, draws, dtype
        self.item: Tensor | None = None
        self.item_bias: Tensor | None = None
        if not isinstance(reward_model, DenseReward) and draws.shared:
            self.item = reward_model.item.detach()[draws.item].to(dtype)
            if reward_model.item_bias is not None:
                self.item_bias = reward_model.item_bias.detach()[draws.item].to(dtype)

    def of(self, rows: slice) -> Tensor:
        """(rows, m)."""
        model, item = self.model, self.draws.item
        if isinstance(model, DenseReward):
            values = model.values.detach()[rows]
            q = values[:, item] if self.draws.shared else values.gather(1, item[rows])
            return q.to(self.dtype)
        e = model.context.detach()[rows].to(self.dtype)
        if self.item is not None:
            q = e @ self.item.T
            if self.item_bias is not None:
                q = q.add_(self.item_bias)
        else:
            t = model.item.detach()[item[rows]].to(self.dtype)
            q = torch.bmm(t, e[:, :, None])[:, :, 0]
            if model.item_bias is not None:
                q = q + model.item_bias.detach()[item[rows]].to(self.dtype)
        return q.sigmoid_() if model.link == "sigmoid" else q


def _finite(values: Tensor) -> Tensor:
    return values.masked_fill(values == float("-inf"), 0.0)
