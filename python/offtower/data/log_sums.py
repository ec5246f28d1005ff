"""Mergeable sums over the rows of a log, for validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.check import BadRow, count_faults, first_bad_rows
from offtower.data.columns import as_float_array, category_values, splitmix64
from offtower.data.log import TableOrigin
from offtower.data.moments import Moments
from offtower.data.rows import hashed
from offtower.data.rules import find_faults
from offtower.data.schema import LogSchema

Target = Callable[[pa.Table], NDArray[np.floating]]

SHOWN_BAD_ROWS = 5
DUPLICATE_KEYS = 8_000_000
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
"""Bits set in each byte."""


@dataclass(frozen=True, eq=False)
class DuplicateCount:
    """Counts repeated keys in bounded memory, by a hash sample of the keys beyond a limit.

    The sample depends on the set of keys alone, so that parts merge in any order.

    Attributes:
        key: (g,) hashed keys, sorted and distinct.
        times: (g,) occurrences of each.
        shift: keys whose first `shift` bits are 0 are kept, and the count is scaled by 2**shift.
    """

    key: NDArray[np.uint64]
    times: NDArray[np.int64]
    shift: int = 0
    limit: int = DUPLICATE_KEYS

    @classmethod
    def of(cls, keys: NDArray[np.uint64], limit: int = DUPLICATE_KEYS) -> DuplicateCount:
        key, times = np.unique(splitmix64(keys), return_counts=True)
        return cls(key, times, 0, limit)._bounded()

    def merge(self, other: DuplicateCount) -> DuplicateCount:
        """Merge."""
        shift = max(self.shift, other.shift)
        one, two = self._above(shift), other._above(shift)
        key = np.concatenate([one.key, two.key])
        order = np.argsort(key, kind="stable")
        key, times = key[order], np.concatenate([one.times, two.times])[order]
        first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if key.size else order
        times = np.add.reduceat(times, first) if key.size else times
        return DuplicateCount(key[first], times, shift, self.limit)._bounded()

    def count(self) -> int:
        """Count rows that repeat an earlier key; an estimate if `shift` is above 0."""
        return int(self.times.sum() - self.key.size) << self.shift

    def _above(self, shift: int) -> DuplicateCount:
        if shift == self.shift:
            return self
        kept = self.key >> np.uint64(64 - shift) == 0
        return DuplicateCount(self.key[kept], self.times[kept], shift, self.limit)

    def _bounded(self) -> DuplicateCount:
        found = self
        while found.key.size > found.limit:
            found = found._above(found.shift + 1)
        return found


@dataclass(frozen=True, eq=False)
class ItemSet:
    """A set of item numbers: sorted, or as a bitmap if there are many."""

    num_items: int
    numbers: NDArray[np.int64] | None
    bits: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, numbers: NDArray[np.int64], num_items: int) -> ItemSet:
        return cls(num_items, np.unique(numbers))._small()

    def merge(self, other: ItemSet) -> ItemSet:
        """Return the union."""
        if self.numbers is not None and other.numbers is not None:
            return ItemSet(self.num_items, np.union1d(self.numbers, other.numbers))._small()
        return ItemSet(self.num_items, None, self._packed() | other._packed())

    def __len__(self) -> int:
        if self.numbers is not None:
            return int(self.numbers.size)
        return int(_BITS[self._packed()].sum(dtype=np.int64))

    def _packed(self) -> NDArray[np.uint8]:
        if self.bits is not None:
            return self.bits
        mask = np.zeros(self.num_items, dtype=bool)
        mask[self.numbers] = True
        return np.packbits(mask)

    def _small(self) -> ItemSet:
        assert self.numbers is not None
        if self.numbers.size * 64 <= self.num_items:
            return self
        return ItemSet(self.num_items, None, self._packed())


@dataclass(frozen=True, eq=False)
class LogSums:
    """Sums over rows of a log.

    Attributes:
        rows: rows read.
        bad, bad_counts: the first bad values, and the counts of all by (column, problem).
        reward, pscore, weight: of the good rows; weight is target / pscore.
        inverse: of 1/pscore by behavior policy, and "" for all rows.
        shown: items in good rows.
        values: of each numeric or categorical feature, up to three of its values.
        pairs: of (round, position), if the log has both.
    """

    rows: int
    bad: tuple[BadRow, ...]
    bad_counts: Counter[tuple[str, str]]
    reward: Moments
    pscore: Moments
    weight: Moments
    inverse: dict[str, Moments]
    shown: ItemSet
    values: dict[str, frozenset[str]] = field(default_factory=dict)
    pairs: DuplicateCount | None = None

    @classmethod
    def of(
        cls,
        table: pa.Table,
        schema: LogSchema,
        catalogue: Catalogue,
        origin: TableOrigin,
        first_row: int,
        target: Target | None = None,
    ) -> LogSums:
        """Sum over a table whose first row has the number `first_row` in the log."""
        faults = find_faults(table, schema, catalogue, origin.file)
        bad: list[BadRow] = []
        good = table
        if faults:
            bad = first_bad_rows(table, faults, origin, first_row, SHOWN_BAD_ROWS)
            wrong = np.logical_or.reduce([fault.mask for fault in faults])
            good = table.filter(pa.array(~wrong))
        some = good.num_rows > 0
        logged = None if schema.pscore is None else as_float_array(good.column(schema.pscore))
        weight = Moments()
        if target is not None and logged is not None and some:
            weight = Moments.of(np.asarray(target(good), dtype=np.float64) / logged)
        pairs = None
        if schema.round_id is not None and schema.position is not None:
            key = splitmix64(hashed(good.column(schema.round_id)))
            pairs = DuplicateCount.of(key ^ hashed(good.column(schema.position)))
        return cls(
            rows=table.num_rows,
            bad=tuple(bad),
            bad_counts=count_faults(faults),
            reward=Moments.of(as_float_array(good.column(schema.reward))),
            pscore=Moments() if logged is None else Moments.of(logged),
            weight=weight,
            inverse=_inverse(good, logged, schema),
            shown=ItemSet.of(catalogue.index_of(good.column(schema.action)), catalogue.num_items),
            values={
                spec.name: frozenset(
                    str(v) for v in pc.unique(table.column(spec.source)).to_pylist()[:3]
                )
                for spec in schema.context
                if some and spec.kind in ("numeric", "category")
            },
            pairs=pairs,
        )

    def merge(self, other: LogSums) -> LogSums:
        """Merge with the sums of later rows."""
        names = list(dict.fromkeys([*self.inverse, *other.inverse]))
        features = list(dict.fromkeys([*self.values, *other.values]))
        pairs = self.pairs
        if pairs is not None and other.pairs is not None:
            pairs = pairs.merge(other.pairs)
        return LogSums(
            rows=self.rows + other.rows,
            bad=(self.bad + other.bad)[:SHOWN_BAD_ROWS],
            bad_counts=self.bad_counts + other.bad_counts,
            reward=self.reward.merge(other.reward),
            pscore=self.pscore.merge(other.pscore),
            weight=self.weight.merge(other.weight),
            inverse={
                name: self.inverse.get(name, Moments()).merge(other.inverse.get(name, Moments()))
                for name in names
            },
            shown=self.shown.merge(other.shown),
            values={
                name: frozenset(
                    sorted(
                        self.values.get(name, frozenset()) | other.values.get(name, frozenset())
                    )[:3]
                )
                for name in features
            },
            pairs=pairs,
        )


def _inverse(
    table: pa.Table, pscore: NDArray[np.float64] | None, schema: LogSchema
) -> dict[str, Moments]:
    if pscore is None or not pscore.size:
        return {}
    inverse = 1.0 / pscore
    found = {"": Moments.of(inverse)}
    if schema.behavior_policy is None:
        return found
    names = pc.dictionary_encode(
        category_values(table.column(schema.behavior_policy)).cast(pa.string())
    )
    place = names.indices.to_numpy(zero_copy_only=False)
    for number, name in enumerate(names.dictionary.to_pylist()):
        found[name] = Moments.of(inverse[place == number])
    return found
