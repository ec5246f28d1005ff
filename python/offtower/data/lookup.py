"""Indices of values among distinct values, by binary search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import category_values, hash_values, is_text


@dataclass(frozen=True, eq=False)
class LookupParts:
    """Arrays of a `Lookup`.

    Attributes:
        values: (n,) distinct.
        sorted_keys: (n,) 64-bit keys; None where the values are these, in this order.
        order: (n,) indices of the values in the order of the keys; None where it is theirs.
        most_alike: largest number of values with the same key.
    """

    values: pa.Array
    sorted_keys: NDArray[Any] | None
    order: NDArray[Any] | None
    most_alike: int


class Lookup:
    """Finds the indices of values in an array of n distinct ones.

    Increasing integers need no memory beside the array. Other values need 12 bytes each (16 from
    2^31 values on) for sorted 64-bit keys and their indices. The key of an integer is the integer,
    that of a text its hash: a text is found only where it equals the value, and different texts
    with the same hash are distinguished.

    Args:
        values: integers or text, none of them null.

    Attributes:
        duplicate: indices of two equal values, or None; with one, `find` is unreliable.
    """

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self.text = is_text(values.type)
        keys = _keys(values)
        self._order: NDArray[Any] | None = None
        if not bool((keys[1:] > keys[:-1]).all()):
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            self._order = order if len(keys) >= 2**31 else order.astype(np.int32)
        self._sorted = keys
        self.duplicate: tuple[int, int] | None = None
        self._keeper: object = None
        self._most_alike = 1
        """Largest number of values with the same key."""
        if self._order is not None:
            self._compare_alike(self._order)

    @classmethod
    def of_parts(cls, parts: LookupParts, keeper: object = None) -> Lookup:
        """Restore what `parts` returned.

        Args:
            keeper: lives as long as the lookup.
        """
        found = cls.__new__(cls)
        found.values, found.text = parts.values, is_text(parts.values.type)
        found.duplicate = None
        found._sorted = _keys(parts.values) if parts.sorted_keys is None else parts.sorted_keys
        found._order, found._most_alike, found._keeper = parts.order, parts.most_alike, keeper
        return found

    def parts(self) -> LookupParts:
        """What a lookup without duplicates is restored from."""
        assert self.duplicate is None
        own = None if self._order is None and not self.text else self._sorted
        return LookupParts(self.values, own, self._order, self._most_alike)

    def find(self, values: pa.Array) -> NDArray[np.int64]:
        """Return the (k,) indices of values; -1 for unknown ones.

        Args:
            values: integers or text as those of this lookup, none of them null.
        """
        n, keys = len(self._sorted), _keys(values)
        found = np.full(len(keys), -1, dtype=np.int64)
        if n == 0 or len(keys) == 0:
            return found
        if not self.text and int(self._sorted[-1]) - int(self._sorted[0]) == n - 1:
            # Consecutive integers need no search.
            nearest = np.clip(keys - self._sorted[0], 0, n - 1)
            return np.where(self._sorted[nearest] == keys, self._index(nearest), -1)
        # In the order of keys, neighbors are found in the same pages and cache lines.
        asked = np.argsort(keys)
        keys = keys[asked]
        first = np.searchsorted(self._sorted, keys)
        for step in range(self._most_alike):
            nearest = np.minimum(first + step, n - 1)
            alike = np.flatnonzero(self._sorted[nearest] == keys)
            index, where = self._index(nearest[alike]), asked[alike]
            if self.text:
                own, others = self.values.take(pa.array(index)), values.take(pa.array(where))
                same = pc.equal(own, others).to_numpy(zero_copy_only=False)
                index, where = index[same], where[same]
            found[where] = index
        return found

    def _index(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the values in rows of the sorted keys."""
        return row if self._order is None else self._order[row].astype(np.int64)

    def _compare_alike(self, order: NDArray[Any]) -> None:
        """Look for equal values among those with the same key."""
        keys = self._sorted
        same = np.flatnonzero(keys[1:] == keys[:-1])
        if not same.size:
            return
        # Runs of equal keys: first and last row of each.
        first = same[np.append(True, np.diff(same) > 1)]
        last = same[np.append(np.diff(same) > 1, True)] + 1
        self._most_alike = int((last - first).max()) + 1
        for start, stop in zip(first.tolist(), last.tolist(), strict=True):
            seen: dict[Any, int] = {}
            for index in order[start : stop + 1].tolist():
                value = self.values[index].as_py()
                if value in seen:
                    self.duplicate = seen[value], index
                    return
                seen[value] = index


class Vocabulary:
    """Distinct values of a category and their indices.

    Args:
        values: distinct, as text or integers, none of them null.
        lookup: of these values; made at first use by default.
    """

    def __init__(self, values: pa.Array, lookup: Lookup | None = None) -> None:
        self.values = values
        self._lookup = lookup

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values, "_lookup": None}

    def find(self, values: pa.Array) -> NDArray[np.int64]:
        """Return the (k,) indices of values of the vocabulary's type; -1 for null and unknown
        ones."""
        if len(self.values) == 0:
            return np.full(len(values), -1, dtype=np.int64)
        if self._lookup is None:
            self._lookup = Lookup(self.values)
        if values.null_count == 0:
            return self._lookup.find(values)
        present = pc.is_valid(values).to_numpy(zero_copy_only=False)
        found = np.full(len(values), -1, dtype=np.int64)
        found[present] = self._lookup.find(values.drop_null())
        return found


def _keys(values: pa.Array) -> NDArray[Any]:
    """Return 64-bit keys: integers themselves, hashes of text."""
    if is_text(values.type):
        return hash_values(values)
    whole: NDArray[np.int64] = category_values(values).to_numpy(zero_copy_only=False)
    return whole
