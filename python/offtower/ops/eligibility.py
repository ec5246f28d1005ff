"""Which items a policy may choose in each row: group bitmaps, excluded items and candidate lists.

The forms combine by AND. An item that is not eligible has a logit of -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

WORD = 64
"""Bits a word of a bitmap."""


@dataclass(frozen=True)
class ItemLists:
    """A list of item numbers for each row, in CSR form; each list is sorted and without repeats."""

    offsets: Tensor
    """(B + 1,) int64; row i has items[offsets[i]:offsets[i + 1]]."""
    items: Tensor
    """(nnz,) int64."""

    @property
    def rows(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """(B,) int64."""
        return self.offsets.diff()

    def entry_rows(self) -> Tensor:
        """(nnz,) the row of each entry."""
        rows = torch.arange(self.rows, dtype=torch.int64, device=self.offsets.device)
        return torch.repeat_interleave(rows, self.lengths, output_size=self.items.shape[0])

    def find(self, row: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Position (n,) of each item in the list of its row, and whether it is there (n,) bool.

        Where it is not, the position is that of the next larger item, at most the number of
        entries. By binary search, O(n log nnz).
        """
        low, end = self.offsets[row], self.offsets[row + 1]
        if not self.items.shape[0]:
            return low, torch.zeros_like(row, dtype=torch.bool)
        last, high = self.items.shape[0] - 1, end
        for _ in range(self.items.shape[0].bit_length()):
            middle = (low + high) // 2
            later = (low < high) & (self.items[middle.clamp_max(last)] < item)
            low = torch.where(later, middle + 1, low)
            high = torch.where(later, high, middle)
        return low, (low < end) & (self.items[low.clamp_max(last)] == item)

    def keep(self, kept: Tensor) -> ItemLists:
        """The lists of the entries where `kept`, (nnz,) bool, is true."""
        count = torch.zeros(kept.shape[0] + 1, dtype=torch.int64, device=kept.device)
        torch.cumsum(kept, 0, out=count[1:])
        return ItemLists(count[self.offsets], self.items[kept])

    def take(self, row: Tensor) -> ItemLists:
        """The lists of some rows, (n,) int64, in their order."""
        length = self.lengths[row]
        offsets = torch.zeros(row.shape[0] + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(length, 0, out=offsets[1:])
        total = int(offsets[-1])
        inside = torch.arange(total, dtype=torch.int64, device=row.device)
        start = torch.repeat_interleave(self.offsets[row] - offsets[:-1], length, output_size=total)
        return ItemLists(offsets, self.items[start + inside])

    def slice_items(self, start: int, stop: int) -> ItemLists:
        """The entries of items [start, stop), numbered from 0."""
        kept = self.keep((self.items >= start) & (self.items < stop))
        return ItemLists(kept.offsets, kept.items - start)

    def compact(self) -> tuple[Tensor, ItemLists]:
        """The distinct items of all lists (n,), rising, and the lists as indices into them.

        With candidate lists, an operator over the embeddings of these items alone has the values of
        one over the whole catalogue, and its gradients have n rows.
        """
        distinct, index = torch.unique(self.items, sorted=True, return_inverse=True)
        return distinct, ItemLists(self.offsets, index)

    def map(self, change: Callable[[Tensor], Tensor]) -> ItemLists:
        return ItemLists(change(self.offsets), change(self.items))


@dataclass(frozen=True)
class Eligibility:
    """The eligible items of each row: in the row's bitmap, not excluded, and among its candidates.

    A part that is None does not restrict. `group` and `bitmap` are given together.
    """

    group: Tensor | None = None
    """(B,) int32, the row of `bitmap` that holds a row's items."""
    bitmap: Tensor | None = None
    """(G, ceil(N / 64)) int64 of unsigned 64-bit words: bit a % 64 of word a // 64 is item a. Bits
    beyond the last item are 0."""
    excluded: ItemLists | None = None
    """Items that a row may not choose."""
    candidates: ItemLists | None = None
    """The only items that a row may choose. Operators then take time in proportion to the lists'
    lengths instead of the number of items."""

    def contains(self, row: Tensor, item: Tensor) -> Tensor:
        """Whether each item is eligible in its row; (n,) bool for row and item (n,) int64."""
        if self.bitmap is not None and not self.bitmap.shape[1]:
            return torch.zeros_like(row, dtype=torch.bool)  # A slice without items.
        found = torch.ones_like(row, dtype=torch.bool)
        if self.group is not None and self.bitmap is not None:
            word = self.bitmap[self.group[row].long(), item // WORD]
            found &= ((word >> (item % WORD)) & 1).bool()
        if self.excluded is not None:
            found &= ~self.excluded.find(row, item)[1]
        if self.candidates is not None:
            found &= self.candidates.find(row, item)[1]
        return found

    def count(self, items: int) -> Tensor:
        """(B,) int64 number of eligible items, of N."""
        eligible = self.resolved()
        if eligible.candidates is not None:
            return eligible.candidates.lengths
        if self.group is not None and self.bitmap is not None:
            count = bit_counts(self.bitmap)[self.group.long()]
        elif self.excluded is not None:
            count = torch.full_like(self.excluded.lengths, items)
        else:
            raise ValueError("this Eligibility restricts nothing and has no rows")
        if self.excluded is not None:
            row = self.excluded.entry_rows()
            hit = Eligibility(self.group, self.bitmap).contains(row, self.excluded.items)
            count = count - self.excluded.keep(hit).lengths
        return count

    def resolved(self) -> Eligibility:
        """The same sets; where there are candidates, as lists alone."""
        if self.candidates is None or (self.bitmap is None and self.excluded is None):
            return self
        rest = Eligibility(self.group, self.bitmap, self.excluded)
        kept = rest.contains(self.candidates.entry_rows(), self.candidates.items)
        return Eligibility(candidates=self.candidates.keep(kept))

    def take(self, row: Tensor) -> Eligibility:
        """The sets of some rows, (n,) int64, in their order."""
        return Eligibility(
            None if self.group is None else self.group[row],
            self.bitmap,
            None if self.excluded is None else self.excluded.take(row),
            None if self.candidates is None else self.candidates.take(row),
        )

    def excluding(self, row: Tensor, item: Tensor, rows: int) -> Eligibility:
        """The sets of B rows without further items, (n,) pairs of a row and an item number."""
        if self.excluded is not None:
            row = torch.cat([row, self.excluded.entry_rows()])
            item = torch.cat([item, self.excluded.items])
        entry = torch.unique(torch.stack([row, item], 1), dim=0)
        offsets = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(torch.bincount(entry[:, 0], minlength=rows), 0, out=offsets[1:])
        return replace(self, excluded=ItemLists(offsets, entry[:, 1].contiguous()))

    def slice_items(self, start: int, stop: int) -> Eligibility:
        """The sets among items [start, stop), numbered from 0; bitmaps are shifted where needed."""
        bitmap = None if self.bitmap is None else sliced_bitmap(self.bitmap, start, stop)
        return Eligibility(
            self.group,
            bitmap,
            None if self.excluded is None else self.excluded.slice_items(start, stop),
            None if self.candidates is None else self.candidates.slice_items(start, stop),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Eligibility:
        """The same sets with every tensor changed."""
        return Eligibility(
            None if self.group is None else change(self.group),
            None if self.bitmap is None else change(self.bitmap),
            None if self.excluded is None else self.excluded.map(change),
            None if self.candidates is None else self.candidates.map(change),
        )

    def to(self, device: torch.device | str) -> Eligibility:
        return self.map(lambda tensor: tensor.to(device))


def sliced_bitmap(bitmap: Tensor, start: int, stop: int) -> Tensor:
    """The bits of items [start, stop), from bit 0; a view where start and stop allow it."""
    first, shift, words = start // WORD, start % WORD, -(-(stop - start) // WORD)
    found = bitmap[:, first : first + words]
    if shift:
        # The right shift of int64 repeats the sign bit, so the bits from above are cleared.
        low = (found >> shift) & ((1 << (WORD - shift)) - 1)
        high = bitmap[:, first + 1 : first + 1 + words] << (WORD - shift)
        found = low
        found[:, : high.shape[1]] |= high
    spare = (stop - start) % WORD
    if spare:
        if not shift:
            found = found.clone()
        found[:, -1] &= (1 << spare) - 1
    return found


def unpacked(bitmap: Tensor, start: int, stop: int) -> Tensor:
    """(G, stop - start) bool of the items [start, stop); `start` is a multiple of 64."""
    words = bitmap[:, start // WORD : -(-stop // WORD)]
    bit = torch.arange(WORD, dtype=torch.int64, device=bitmap.device)
    return ((words[:, :, None] >> bit) & 1).flatten(1)[:, : stop - start].bool()


def bit_counts(bitmap: Tensor) -> Tensor:
    """(G,) int64 number of set bits of each row."""
    # Sums of adjacent fields of 1, 2, 4 and 8 bits, in bytes at last (Warren, "Hacker's Delight").
    x = bitmap - ((bitmap >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return x.view(torch.uint8).sum(1, dtype=torch.int64)


class ItemMask:
    """Sets logits of items that are not eligible to -inf, chunk by chunk of the items.

    Args:
        eligible: without candidate lists.
    """

    def __init__(self, eligible: Eligibility) -> None:
        self.group, self.bitmap = eligible.group, eligible.bitmap
        self.excluded: tuple[Tensor, Tensor] | None = None
        if eligible.excluded is not None:
            item, order = torch.sort(eligible.excluded.items, stable=True)
            self.excluded = item, eligible.excluded.entry_rows()[order]

    def ineligible(self, start: int, stop: int, rows: int) -> Tensor:
        """(B, stop - start) bool; `start` is a multiple of 64."""
        if self.group is not None and self.bitmap is not None:
            mask = ~unpacked(self.bitmap, start, stop)[self.group.long()]
        else:
            assert self.excluded is not None
            device = self.excluded[0].device
            mask = torch.zeros(rows, stop - start, dtype=torch.bool, device=device)
        if self.excluded is not None:
            item, row = self.excluded
            bounds = torch.tensor([start, stop], dtype=torch.int64, device=item.device)
            first, last = torch.searchsorted(item, bounds).tolist()
            mask[row[first:last], item[first:last] - start] = True
        return mask
