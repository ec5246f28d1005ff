"""Lists of item numbers, one for each row, and membership in them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import Column, list_parts
from offtower.data.features import BagArray


def item_lists(column: Column, catalogue: Catalogue) -> tuple[BagArray, NDArray[np.int64]]:
    """Read lists of item ids as item numbers, sorted and without repeats in each row.

    Returns:
        the lists, and the (n,) numbers of ids that the catalogue does not have (null ids included),
        which are left out.
    """
    ids, offsets = list_parts(column)
    n, items = len(offsets) - 1, catalogue.num_items
    number = catalogue.index_of(ids)
    row = np.repeat(np.arange(n), np.diff(offsets))
    unknown = np.bincount(row[number < 0], minlength=n)
    known = number >= 0
    key = np.unique(row[known] * np.int64(items) + number[known])
    row = key // items
    ends = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n))]).astype(np.int64)
    return BagArray(key - row * items, ends), unknown


def entry_rows(lists: BagArray) -> NDArray[np.int64]:
    """(nnz,) row of each entry."""
    return np.repeat(np.arange(len(lists), dtype=np.int64), np.diff(lists.offsets))


def holds(
    lists: BagArray, row: NDArray[np.int64], item: NDArray[np.int64], num_items: int
) -> NDArray[np.bool_]:
    """(m,) whether the list of `row` (m,) holds `item` (m,)."""
    return contains_sorted(
        entry_rows(lists) * np.int64(num_items) + lists.values, row * np.int64(num_items) + item
    )


def contains_sorted(ordered: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(m,) whether each wanted number is among the ordered ones."""
    if ordered.size == 0:
        return np.zeros(wanted.shape, dtype=bool)
    place = np.minimum(np.searchsorted(ordered, wanted), ordered.size - 1)
    found: NDArray[np.bool_] = ordered[place] == wanted
    return found
