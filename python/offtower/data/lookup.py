"""Indices of values among distinct values, by binary search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import category_values, hash_values, is_text


class Lookup:
    """Finds the indices of values in an array of n distinct ones.

    Increasing integers need no memory beside the array. Other values need 12 bytes each (16 from
    2^31 values on) for sorted 64-bit keys (hashes of text) and their indices.

    Args:
        values: integers or text, none of them null.

    Attributes:
        duplicate: indices of two values with the same key, or None; with one, `find` is unreliable.
    """

    def __init__(self, values: pa.Array) -> None:
        self.text = is_text(values.type)
        keys = self.keys(values)
        self._order: NDArray[Any] | None = None
        if not bool((keys[1:] > keys[:-1]).all()):
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            self._order = order if len(keys) >= 2**31 else order.astype(np.int32)
        self._sorted = keys
        self.duplicate: tuple[int, int] | None = None
        if self._order is not None:
            equal = np.flatnonzero(keys[1:] == keys[:-1])
            if equal.size:
                self.duplicate = int(self._order[equal[0]]), int(self._order[equal[0] + 1])

    def find(self, keys: NDArray[Any]) -> NDArray[np.int64]:
        """Return the (k,) indices of the values with these keys; -1 for unknown keys."""
        n = len(self._sorted)
        if n == 0:
            return np.full(len(keys), -1, dtype=np.int64)
        if not self.text and int(self._sorted[-1]) - int(self._sorted[0]) == n - 1:
            # Consecutive integers need no search.
            nearest = np.clip(keys - self._sorted[0], 0, n - 1)
        else:
            nearest = np.minimum(np.searchsorted(self._sorted, keys), n - 1)
        index = nearest if self._order is None else self._order[nearest].astype(np.int64)
        found: NDArray[np.int64] = np.where(self._sorted[nearest] == keys, index, -1)
        return found

    def keys(self, values: pa.Array) -> NDArray[Any]:
        """Return 64-bit keys: integers themselves, hashes of text."""
        if self.text:
            return hash_values(values)
        whole: NDArray[np.int64] = category_values(values).to_numpy(zero_copy_only=False)
        return whole


class Vocabulary:
    """Distinct values of a category and their indices.

    Args:
        values: distinct, as text or integers, none of them null.
    """

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self._lookup: Lookup | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "_lookup": None}

    def find(self, values: pa.Array) -> NDArray[np.int64]:
        """Return the (k,) indices of values of the vocabulary's type; -1 for null and unknown ones.

        Texts found by hash are compared; with colliding hashes in the vocabulary Arrow searches it.
        """
        if len(self.values) == 0:
            return np.full(len(values), -1, dtype=np.int64)
        if self._lookup is None:
            self._lookup = Lookup(self.values)
        if self._lookup.duplicate is not None:
            known = pc.index_in(values, value_set=self.values, skip_nulls=True)
            numbers = pc.fill_null(known, -1).to_numpy(zero_copy_only=False)
            return np.asarray(numbers, dtype=np.int64)
        present = pc.is_valid(values).to_numpy(zero_copy_only=False)
        filled = pc.fill_null(values, "" if self._lookup.text else 0)
        found = np.where(present, self._lookup.find(self._lookup.keys(filled)), -1)
        if not self._lookup.text:
            return found
        candidates = self.values.take(pa.array(np.maximum(found, 0)))
        same = pc.fill_null(pc.equal(candidates, filled), False).to_numpy(zero_copy_only=False)
        return np.where(same, found, -1)
