"""From a value to its place among distinct values, by binary search: nothing is built anew for each
question, as a hash table would be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import category_values, hash_values, is_text


class Lookup:
    """Places of values in an array of n distinct ones.

    Integers that rise, such as a sorted vocabulary or numbered items, take no memory beside the
    array itself; other values 12 bytes each (16 from 2^31 values on): sorted 64-bit keys, of text
    its hashes, and where they stand.

    Args:
        values: integers or text, none of them null.

    Attributes:
        twice: places of two values with one key, where there are such; then places found are not
            to be trusted.
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
        self.twice: tuple[int, int] | None = None
        if self._order is not None:
            equal = np.flatnonzero(keys[1:] == keys[:-1])
            if equal.size:
                self.twice = int(self._order[equal[0]]), int(self._order[equal[0] + 1])

    def find(self, keys: NDArray[Any]) -> NDArray[np.int64]:
        """(k,) places of the values that have these keys; -1 where none has."""
        n = len(self._sorted)
        if n == 0:
            return np.full(len(keys), -1, dtype=np.int64)
        if not self.text and int(self._sorted[-1]) - int(self._sorted[0]) == n - 1:
            # Integers without gaps need no search.
            nearest = np.clip(keys - self._sorted[0], 0, n - 1)
        else:
            nearest = np.minimum(np.searchsorted(self._sorted, keys), n - 1)
        place = nearest if self._order is None else self._order[nearest].astype(np.int64)
        found: NDArray[np.int64] = np.where(self._sorted[nearest] == keys, place, -1)
        return found

    def keys(self, values: pa.Array) -> NDArray[Any]:
        """64-bit keys by which values are found: integers themselves, hashes of text."""
        if self.text:
            return hash_values(values)
        whole: NDArray[np.int64] = category_values(values).to_numpy(zero_copy_only=False)
        return whole


class Vocabulary:
    """Distinct values of a category and their numbers.

    Args:
        values: sorted, as text or integers, none of them null.
    """

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self._lookup: Lookup | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process makes its own lookup."""
        return {"values": self.values, "_lookup": None}

    def find(self, values: pa.Array) -> NDArray[np.int64]:
        """(k,) numbers of values of the vocabulary's type; -1 for null and for what is not there.

        Sound for any text: what a hash has found is compared, and a vocabulary in which two hashes
        are equal is searched by Arrow.
        """
        if len(self.values) == 0:
            return np.full(len(values), -1, dtype=np.int64)
        if self._lookup is None:
            self._lookup = Lookup(self.values)
        if self._lookup.twice is not None:
            known = pc.index_in(values, value_set=self.values, skip_nulls=True)
            return pc.fill_null(known, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        present = pc.is_valid(values).to_numpy(zero_copy_only=False)
        filled = pc.fill_null(values, "" if self._lookup.text else 0)
        found = np.where(present, self._lookup.find(self._lookup.keys(filled)), -1)
        if not self._lookup.text:
            return found
        candidates = self.values.take(pa.array(np.maximum(found, 0)))
        same = pc.fill_null(pc.equal(candidates, filled), False).to_numpy(zero_copy_only=False)
        return np.where(same, found, -1)
