"""Item ids of an export, and the numbers that vectors and indexes know items by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from offtower.data.columns import Column
from offtower.errors import DataError
from offtower.retrieval.vectors import id_keys

IntArray: TypeAlias = NDArray[np.int64]
Filter: TypeAlias = Sequence[Any] | Sequence[Sequence[Any]] | NDArray[Any]
"""Item ids that must not be returned: one list for all contexts, or one per context."""


class ItemIds:
    """Ids by item number, and numbers by id.

    Args:
        ids: (N,) ids in the order of the items.
        text: whether they are text; integers otherwise.
    """

    def __init__(self, ids: pa.ChunkedArray, *, text: bool) -> None:
        self._ids, self._text = ids, text

    @cached_property
    def _keys(self) -> tuple[NDArray[np.uint64], IntArray]:
        """Sorted 64-bit keys and their items, 16 bytes per item, built at first use."""
        keys = id_keys(self._ids.combine_chunks())
        order = np.argsort(keys)
        return keys[order], order

    def of(self, item: IntArray) -> list[Any]:
        """Return the ids of item numbers."""
        ids: list[Any] = self._ids.take(pa.array(item)).to_pylist()
        return ids

    def numbers(self, ids: Column | Sequence[Any]) -> IntArray:
        """Return the (n,) item numbers of ids; -1 for unknown ids.

        Raises:
            DataError: ids are numbers and those of the export are text, or the reverse.
        """
        try:
            whole = pa.uint64() if pa.types.is_uint64(self._ids.type) else pa.int64()
            values = pa.array(list(ids), pa.string() if self._text else whole)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(
                f"item ids of this export are {'text' if self._text else 'integers'}: {error}"
            ) from error
        ordered, order = self._keys
        wanted = id_keys(values)
        index = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        return np.where(ordered[index] == wanted, order[index], -1)

    def excluded(self, exclude: Filter | None, n: int) -> list[IntArray]:
        """Return sorted, distinct item numbers to leave out, for each of n contexts.

        Raises:
            DataError: there are not as many lists as contexts; or as `numbers`.
        """
        nothing = np.zeros(0, dtype=np.int64)
        if exclude is None or len(exclude) == 0:
            return [nothing] * n
        if not isinstance(exclude[0], list | tuple | set | np.ndarray):
            numbers = self.numbers(exclude)
            return [np.unique(numbers[numbers >= 0])] * n
        if len(exclude) != n:
            raise DataError(f"{len(exclude)} lists of ids to exclude for {n} contexts")
        found = [self.numbers(list(ids)) if len(ids) else nothing for ids in exclude]
        return [np.unique(numbers[numbers >= 0]) for numbers in found]
