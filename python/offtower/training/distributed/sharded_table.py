"""Rows of a table of items whose rows belong to the workers that hold the items.

Histories of a worker's rows list items of all workers. The distinct items of the step are gathered,
each worker fills in the rows that it owns, and the sum of all has each row; its gradient, summed
over the workers, ends at the owner. A step communicates two numbers per distinct item of its
histories and width, whatever the size of the catalogue.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offtower.data.features import to_device
from offtower.models.features import UNKNOWN
from offtower.models.histories import ItemTable
from offtower.training.workers import Workers


class ShardedItemTable(ItemTable):
    """Like `ItemTable`; every call is collective.

    Args:
        table: the unknown item, then this worker's items.
        codes: (n,) row of each item in a table of the whole catalogue.
        workers: own the other items.
    """

    def __init__(self, table: nn.Embedding, codes: Tensor, workers: Workers) -> None:
        super().__init__(table)
        self._codes, self._order = torch.sort(codes)
        self._workers = workers

    def __call__(self, codes: Tensor) -> Tensor:
        device = codes.device
        distinct = torch.unique(codes[codes != UNKNOWN].cpu())
        count = torch.tensor([len(distinct)], dtype=torch.int64, device="cpu")
        counts = self._workers.gather(count, [1] * self._workers.size).tolist()
        wanted = torch.unique(self._workers.gather(distinct, counts))
        position = torch.searchsorted(self._codes, wanted).clamp_max(len(self._codes) - 1)
        mine = (self._codes[position] == wanted).nonzero()[:, 0]
        local = 1 + self._order[position[mine]]
        own: Tensor = self.table(to_device(local, device))
        empty = own.new_zeros(len(wanted), self.dim)
        whole = sum_parts(empty.index_put((to_device(mine, device),), own), self._workers)
        # Each worker has the unknown item, whose gradients are summed with those of other weights.
        unknown: Tensor = self.table(torch.full((1,), UNKNOWN, dtype=torch.int64, device=device))
        index = 1 + torch.searchsorted(to_device(wanted, device), codes)
        return torch.cat([unknown, whole])[index.masked_fill(codes == UNKNOWN, 0)]


class _SummedParts(torch.autograd.Function):
    """Sum over workers, each of which makes something else of it: so their gradients add up."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        total = workers.sum(part)
        return total.clone() if total is part else total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.workers.sum(gradients[0].contiguous()), None


def sum_parts(part: Tensor, workers: Workers) -> Tensor:
    """Sum (...) parts of rows that the workers read for rows of their own."""
    total: Tensor = _SummedParts.apply(part, workers)  # type: ignore[no-untyped-call]
    return total
