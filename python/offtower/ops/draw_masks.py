"""Draws of the sampled softmax that do not count in a row: hits of exact items, ineligible ones."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.ops.eligibility import WORD, Eligibility, ItemLists


class EligibleDraws:
    """Which of m shared draws each row may choose, for ranges of rows.

    The draws' expected counts stay those of all items, so that the sums over a row's eligible items
    are estimated without bias.
    """

    def __init__(self, eligible: Eligibility, item: Tensor) -> None:
        self._sets, self._item = eligible, item
        self._excluded: Tensor | None = None
        self._candidates: Tensor | None = None
        if not item.is_cuda:
            # Pairs (row, draw), by one search: not a search for each row and draw.
            if eligible.excluded is not None:
                self._excluded = _pairs(item, eligible.excluded)
            if eligible.candidates is not None:
                self._candidates = _pairs(item, eligible.candidates)

    def refused(self, rows: slice) -> Tensor:
        """(n, m) bool."""
        sets, item = self._sets, self._item
        n = rows.stop - rows.start
        if sets.group is not None and sets.bitmap is not None:
            word = sets.bitmap[sets.group[rows].long()[:, None], item // WORD]
            found = ((word >> (item % WORD)) & 1) == 0
        else:
            found = torch.zeros(n, len(item), dtype=torch.bool, device=item.device)
        if item.is_cuda:
            row = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=item.device)
            lists = Eligibility(excluded=sets.excluded, candidates=sets.candidates)
            there = lists.contains(row.repeat_interleave(len(item)), item.repeat(n))
            return found.logical_or_(~there.view(n, -1))
        if self._excluded is not None:
            found[rows_of(self._excluded, rows)] = True
        if self._candidates is not None:
            there = torch.zeros_like(found)
            there[rows_of(self._candidates, rows)] = True
            found |= ~there
        return found


def are_eligible(item: Tensor, eligible: Eligibility) -> Tensor:
    """(B, k) bool, whether items (B, k) are eligible in their rows."""
    row = torch.arange(len(item), dtype=torch.int64, device=item.device)
    found = eligible.contains(row.repeat_interleave(item.shape[1]), item.reshape(-1))
    return found.view(item.shape)


def rows_of(pairs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The pairs (row, draw) of a range of rows, as an index into it; `pairs` is sorted by row."""
    bounds = torch.tensor([rows.start, rows.stop], dtype=torch.int64, device=pairs.device)
    first, last = torch.searchsorted(pairs[:, 0].contiguous(), bounds).tolist()
    return pairs[first:last, 0] - rows.start, pairs[first:last, 1]


def _pairs(sampled_item: Tensor, lists: ItemLists) -> Tensor:
    """(p, 2) pairs of a row and a draw that hits its list, sorted by row."""
    return _hits(sampled_item, lists.items, lists.entry_rows())


def hits_of(sampled_item: Tensor, counted_exactly: Tensor) -> Tensor:
    """Find the draws that hit one of their row's items (B, k), as `Draws.masked` holds them.

    For shared draws by binary search, O((B k + m) log m): no (B, m) comparison. On a GPU the logits
    are compared with the items, chunk by chunk.
    """
    if sampled_item.dim() == 2:
        mask = torch.zeros(sampled_item.shape, dtype=torch.bool, device=sampled_item.device)
        for column in counted_exactly.unbind(dim=1):
            mask |= sampled_item == column[:, None]
        return mask
    if sampled_item.is_cuda:
        return counted_exactly
    row = torch.arange(len(counted_exactly), dtype=torch.int64, device=sampled_item.device)
    return _hits(
        sampled_item,
        counted_exactly.reshape(-1),
        row.repeat_interleave(counted_exactly.shape[1]),
    )


def _hits(sampled_item: Tensor, wanted: Tensor, wanted_row: Tensor) -> Tensor:
    """(p, 2) pairs of the row of a wanted item and a draw of it, in the order of `wanted`."""
    ordered, place = torch.sort(sampled_item, stable=True)
    first = torch.searchsorted(ordered, wanted)
    times = torch.searchsorted(ordered, wanted, right=True) - first
    total = torch.cumsum(times, 0)
    which = torch.repeat_interleave(times)
    inside = (
        torch.arange(len(which), dtype=torch.int64, device=which.device) - (total - times)[which]
    )
    return torch.stack([wanted_row[which], place[first[which] + inside]], dim=1)
