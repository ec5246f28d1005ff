"""The operators over candidate lists: a softmax over each row's own items.

Time and memory are in proportion to the lists' lengths; there is no pass over the items. A core
gives the two products over the lists, all else is torch on one number an entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from offtower.ops.eligibility import ItemLists
from offtower.ops.reference import MAX_LOGITS, first_k, shared_cotangent
from offtower.ops.tiled_draws import DrawSettings, SoftmaxDraws, draw_rows
from offtower.ops.types import (
    LOG_PROB_FLOOR,
    Cotangents,
    ForwardResults,
    ForwardStatistics,
    Gradients,
    Needs,
    Operands,
    PartialTerms,
    RunningSums,
    finite_top,
)


class ListProducts(Protocol):
    """Products over the entries e of lists, in the accumulation dtype."""

    def list_dots(self, rows: Tensor, items: Tensor, lists: ItemLists) -> Tensor:
        """(nnz,) <rows[i], items[lists.items[e]]> for the entries e of each list i."""
        ...

    def list_sums(self, weight: Tensor, matrix: Tensor, lists: ItemLists) -> Tensor:
        """(B, d) sum over the entries e of each list of weight[e] matrix[lists.items[e]]."""
        ...


class TorchListProducts:
    """Products in plain torch, for every dtype and device."""

    def list_dots(self, rows: Tensor, items: Tensor, lists: ItemLists) -> Tensor:
        dtype = torch.promote_types(rows.dtype, torch.float32)
        row, found = lists.entry_rows(), rows.new_empty(lists.items.shape, dtype=dtype)
        for part in _pieces(lists.items.shape[0], rows.shape[1]):
            u, v = rows[row[part]].to(dtype), items[lists.items[part]].to(dtype)
            torch.sum(u.mul_(v), 1, out=found[part])
        return found

    def list_sums(self, weight: Tensor, matrix: Tensor, lists: ItemLists) -> Tensor:
        row = lists.entry_rows()
        found = weight.new_zeros(lists.rows, matrix.shape[1])
        for part in _pieces(lists.items.shape[0], matrix.shape[1]):
            scaled = matrix[lists.items[part]].to(weight.dtype).mul_(weight[part][:, None])
            found.index_add_(0, row[part], scaled)
        return found


class CandidateCore:
    """A core for operands with candidate lists.

    Args:
        products: of the core that was chosen for the operands.
    """

    def __init__(self, name: str, products: ListProducts) -> None:
        self.name, self.products = name, products

    def available(self) -> bool:
        return True

    def status(self) -> str:
        return "available"

    def refusal(self, x: Operands, k: int = 0) -> str:
        return ""

    def forward(self, x: Operands, entropy: bool) -> ForwardResults:
        found = self.partial(x, entropy)
        sums = found.sums

        def given(value: Tensor | None) -> Tensor:
            return sums.total.new_empty(0) if value is None else value

        return ForwardResults(
            log_prob=(found.action_logit - finite_top(sums.top)) - sums.total.log(),
            log_normalizer=sums.log_normalizer,
            expected_reward=given(sums.expected_reward),
            action_reward=given(found.action_reward),
            entropy=given(sums.entropy),
            reference_max=sums.top,
            total=sums.total,
        )

    def partial(self, x: Operands, entropy: bool) -> PartialTerms:
        lists = _lists_of(x)
        row, s = lists.entry_rows(), self._logits(x, lists)
        top = _reduced(s, "max", lists)
        shifted = s - finite_top(top)[row]
        p = shifted.exp()
        at, here = _entry_of_action(x, lists)
        reward = action_reward = None
        if x.reward is not None:
            q = self._rewards(x, lists)
            reward = _reduced(p * q, "sum", lists)
            action_reward = _at(q, at, here, 0.0)
        centered = None
        if entropy:
            centered = _reduced(p * shifted.clamp_min(LOG_PROB_FLOOR), "sum", lists)
        sums = RunningSums(top, _reduced(p, "sum", lists), reward, centered)
        return PartialTerms(sums, _at(s, at, here, float("-inf")), action_reward)

    def backward(
        self, x: Operands, forward: ForwardStatistics, g: Cotangents, needs: Needs
    ) -> Gradients:
        """As `ReferenceCore.backward`, with ds for the entries alone."""
        lists = _lists_of(x)
        row, total = lists.entry_rows(), forward.total
        base = shared_cotangent(forward, g)
        shifted = self._logits(x, lists).sub_(finite_top(forward.reference_max)[row])
        factor = base[row]
        if g.expected_reward is not None:
            factor = factor + g.expected_reward[row] * self._rewards(x, lists)
        if g.entropy is not None:
            log_pi = (shifted - total.log()[row]).clamp_min(LOG_PROB_FLOOR)
            factor = factor - g.entropy[row] * log_pi
        ds = shifted.exp_().mul_(factor / total[row])
        if g.log_prob is not None and len(ds):
            at, here = _entry_of_action(x, lists)
            of_action = g.log_prob.to(ds.dtype).masked_fill(~here, 0.0)
            ds.index_add_(0, at.clamp_max(len(ds) - 1), of_action)
        du = dv = db = None
        if needs.context:
            du = self.products.list_sums(ds, x.item, lists).div_(x.temperature).to(x.context.dtype)
        if needs.item or needs.item_bias:
            distinct, order, of_item = _by_item(lists, row)
            ds = ds[order]
            if needs.item:
                found = self.products.list_sums(ds, x.context, of_item).div_(x.temperature)
                dv = torch.zeros_like(x.item)
                dv[distinct] = found.to(dv.dtype)
            if needs.item_bias:
                db = x.item.new_zeros(x.items)
                db[distinct] = _reduced(ds, "sum", of_item).to(db.dtype)
        return Gradients(du, dv, db)

    def top_k(self, x: Operands, k: int) -> tuple[Tensor, Tensor]:
        lists = _lists_of(x)
        s = self._logits(x, lists)
        best = s.new_full((x.rows, k), float("-inf"))
        index = lists.items.new_full((x.rows, k), -1)
        for rows, score, item in padded_blocks(lists, s, k):
            best[rows], index[rows] = first_k(score, item, k)
        return best, index

    def draw(self, x: Operands, settings: DrawSettings) -> SoftmaxDraws:
        lists = _lists_of(x)
        parts = []
        for rows, score, item in padded_blocks(lists, self._logits(x, lists)):
            # One tile, so that a row's draws do not depend on the width of its block.
            found = draw_rows(score, score.shape[1], settings.take(rows))
            number = item.gather(1, found.item.clamp_min(0)).masked_fill(found.item < 0, -1)
            parts.append(found._replace(item=number))
        return SoftmaxDraws(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _logits(self, x: Operands, lists: ItemLists) -> Tensor:
        """(nnz,)."""
        s = self.products.list_dots(x.context, x.item, lists)
        if x.temperature != 1.0:
            s = s.div_(x.temperature)
        return s if x.item_bias is None else s.add_(x.item_bias[lists.items])

    def _rewards(self, x: Operands, lists: ItemLists) -> Tensor:
        """(nnz,) q of the entries."""
        reward = x.reward
        assert reward is not None
        if reward.dense is not None:
            return reward.dense[lists.entry_rows(), lists.items].to(x.accumulation_dtype)
        assert reward.context is not None and reward.item is not None
        q = self.products.list_dots(reward.context, reward.item, lists)
        if reward.item_bias is not None:
            q = q.add_(reward.item_bias[lists.items])
        return q.sigmoid_() if reward.sigmoid else q


def padded_blocks(
    lists: ItemLists, score: Tensor, width: int = 1
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows with their entries side by side, at least `width` of them.

    Yields:
        the rows, their scores (n, w), and item numbers (n, w); -inf and -1 for none.
    """
    longest = max(1, width, int(lists.lengths.max()) if lists.rows else 0)
    column = torch.arange(longest, dtype=torch.int64, device=score.device)
    step = max(1, MAX_LOGITS // longest)
    for start in range(0, lists.rows, step):
        rows = slice(start, min(start + step, lists.rows))
        absent = column >= lists.lengths[rows][:, None]
        found = score.new_full(absent.shape, float("-inf"))
        number = lists.items.new_full(absent.shape, -1)
        if len(score):
            entry = (lists.offsets[:-1][rows][:, None] + column).masked_fill(absent, 0)
            found = score[entry].masked_fill(absent, float("-inf"))
            number = lists.items[entry].masked_fill(absent, -1)
        yield rows, found, number


def _lists_of(x: Operands) -> ItemLists:
    assert x.candidates is not None
    return x.candidates


def _pieces(entries: int, width: int) -> Iterator[slice]:
    step = max(1, MAX_LOGITS // max(1, width))
    for start in range(0, entries, step):
        yield slice(start, min(start + step, entries))


def _reduced(values: Tensor, how: str, lists: ItemLists) -> Tensor:
    """(B,) maximum or sum of each list; -inf and 0 of none."""
    initial = float("-inf") if how == "max" else 0.0
    found: Tensor = torch.segment_reduce(
        values, how, offsets=lists.offsets, initial=initial, unsafe=True
    )
    return found


def _entry_of_action(x: Operands, lists: ItemLists) -> tuple[Tensor, Tensor]:
    row = torch.arange(x.rows, dtype=torch.int64, device=x.action.device)
    return lists.find(row, x.action)


def _at(values: Tensor, at: Tensor, here: Tensor, otherwise: float) -> Tensor:
    """(B,) the values of entries `at` where `here`."""
    if not len(values):
        return values.new_full(at.shape, otherwise)
    return values[at.clamp_max(len(values) - 1)].masked_fill(~here, otherwise)


def _by_item(lists: ItemLists, row: Tensor) -> tuple[Tensor, Tensor, ItemLists]:
    """The distinct items, the entries sorted by item, and for each item its entries' rows."""
    item, order = torch.sort(lists.items, stable=True)
    distinct, count = torch.unique_consecutive(item, return_counts=True)
    offsets = torch.zeros(len(distinct) + 1, dtype=torch.int64, device=item.device)
    torch.cumsum(count, 0, out=offsets[1:])
    return distinct, order, ItemLists(offsets, row[order])
