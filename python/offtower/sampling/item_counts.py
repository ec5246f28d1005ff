"""Numbers of logged rows per item."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.log import Log
from offtower.progress import Progress


@dataclass(frozen=True)
class ItemCounts:
    """Row counts of the logged items; items without rows take no memory.

    Attributes:
        item: (k,) distinct item numbers, ascending.
        count: (k,) their rows, all positive.
        elsewhere: rows of other items, if these are the counts of a part of the catalogue.
    """

    item: NDArray[np.int64]
    count: NDArray[np.int64]
    elsewhere: int = 0

    @cached_property
    def rows(self) -> int:
        """Rows of the whole log."""
        return int(self.count.sum()) + self.elsewhere

    def share(self, item: NDArray[np.int64]) -> NDArray[np.float64]:
        """f(a), the share of rows of each item; 0 for items that were never logged."""
        return self.lookup(item, self.count) / self.rows

    def lookup(self, item: NDArray[np.int64], values: NDArray[Any]) -> NDArray[np.float64]:
        """Take items from `values` (k,), which has one value per logged item; 0 for others."""
        if self.item.size == 0:
            return np.zeros(item.shape)
        index = np.minimum(np.searchsorted(self.item, item), self.item.size - 1)
        return np.where(self.item[index] == item, values[index], 0.0)

    @classmethod
    def of(cls, action: NDArray[np.int64]) -> ItemCounts:
        """Count an array of item numbers."""
        item, count = np.unique(action, return_counts=True)
        return cls(item.astype(np.int64), count.astype(np.int64))

    def merge(self, other: ItemCounts) -> ItemCounts:
        """Add the counts of another log."""
        item, index = np.unique(np.concatenate([self.item, other.item]), return_inverse=True)
        count = np.zeros(item.size, dtype=np.int64)
        np.add.at(count, index, np.concatenate([self.count, other.count]))
        return ItemCounts(item, count, self.elsewhere + other.elsewhere)


def count_items(
    log: Log,
    catalogue: Catalogue,
    progress: Progress | None = None,
    within: tuple[int, int] | None = None,
) -> ItemCounts:
    """Count the log's actions in one pass; rows of items outside the catalogue are ignored.

    Args:
        within: (start, stop) of the items that are counted one by one; all by default. Rows of
            other items are counted together.
    """
    progress = progress or Progress()
    progress.start("counting the logged items", log.num_rows)
    start, stop = within or (0, catalogue.num_items)
    elsewhere = 0
    total = ItemCounts.of(np.zeros(0, dtype=np.int64))
    waiting: list[NDArray[np.int64]] = []
    size = 0
    tables = log.read_row_groups(range(len(log.row_group_sizes)), [log.schema.action])
    for rows, table in zip(log.row_group_sizes.tolist(), tables, strict=True):
        action = catalogue.index_of(table.column(log.schema.action))
        known = action[action >= 0]
        waiting.append(known[(known >= start) & (known < stop)])
        size += len(waiting[-1])
        elsewhere += len(known) - len(waiting[-1])
        # Merge when the new part is as large as the total: amortized constant work per row.
        if size > max(1 << 20, total.item.size):
            total, waiting, size = total.merge(ItemCounts.of(np.concatenate(waiting))), [], 0
        progress.advance(rows)
    progress.finish()
    rest = ItemCounts.of(np.concatenate([np.zeros(0, np.int64), *waiting]))
    return replace(total.merge(rest), elsewhere=elsewhere)
