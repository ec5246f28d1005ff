"""Groups of rows with equal attribute values and times, and the bitmaps of their eligible items."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from offtower.data.catalogue import Catalogue
from offtower.data.columns import as_array, timestamps
from offtower.data.eligible_forms import WORD, AttributeItems, IntervalItems, Numbers, Words
from offtower.data.features import tensor_of
from offtower.data.schema import LogSchema
from offtower.errors import DataError

Mask = NDArray[np.bool_]

CACHE_BYTES = 1 << 29
"""Bitmaps that are kept between batches."""
BATCH_BYTES = 1 << 34
"""Bitmaps of one batch, at most."""

_GROUP = -1
"""Place of a whole key in the cache, beside the numbers of the attributes."""
_KEPT_COUNTS = 1_000_000
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(
    axis=1, dtype=np.uint8
)


@dataclass(frozen=True)
class BitmapLimits:
    """Memory of bitmaps.

    Attributes:
        cache_bytes: of those that are kept between batches.
        batch_bytes: of those of one batch, at most.
    """

    cache_bytes: int = CACHE_BYTES
    batch_bytes: int = BATCH_BYTES


class ItemGroups:
    """The forms `attribute` and `interval`: keys of rows, and bitmaps of keys.

    A key is the combination of the row's attribute values and of the segment of its time between
    the times at which items come and go. Rows with equal keys have equal bitmaps.

    Args:
        catalogue: has the columns that the forms name.
        schema: of the log, with a section `eligible`.
        limits: of the bitmaps' memory.

    Raises:
        DataError: the catalogue lacks a column, a column is of a wrong type, or there are more
            combinations than 64-bit keys.
    """

    def __init__(self, catalogue: Catalogue, schema: LogSchema, limits: BitmapLimits) -> None:
        assert schema.eligible is not None, "the caller checks the schema"
        section = schema.eligible
        self.num_items = catalogue.num_items
        self.timestamp = schema.timestamp
        self.attributes = [
            AttributeItems(form, _item_column(catalogue, form.item)) for form in section.attribute
        ]
        self.interval: IntervalItems | None = None
        if section.interval is not None:
            form = section.interval
            self.interval = IntervalItems(
                form,
                None if form.start is None else _item_column(catalogue, form.start),
                None if form.until is None else _item_column(catalogue, form.until),
            )
        self._sizes = [one.cardinality for one in self.attributes]
        if self.interval is not None:
            self._sizes.append(self.interval.cardinality)
        if np.prod([float(size) for size in self._sizes]) >= 2.0**62:
            raise DataError(
                "the section 'eligible' has too many combinations of attribute values and times: "
                + " x ".join(f"{size:,}" for size in self._sizes)
            )
        self._limits = limits
        self._words: OrderedDict[tuple[int, int], Words] = OrderedDict()
        self._counts: dict[int, int] = {}
        self._stacked: tuple[Numbers, torch.Tensor] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be made again."""
        made: dict[str, Any] = {
            "_words": OrderedDict(),
            "_counts": {},
            "_stacked": None,
            "_lock": None,
        }
        return {**self.__dict__, **made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def keys(self, table: pa.Table) -> Numbers | None:
        """(n,) keys of rows; None where there is no form. A null time counts as 0."""
        parts = [one.number(table.column(one.form.context)) for one in self.attributes]
        if self.interval is not None:
            assert self.timestamp is not None, "the schema checks it"
            column = as_array(table.column(self.timestamp))
            zero = pc.cast(pa.scalar(0, pa.int64()), column.type)
            parts.append(self.interval.number(timestamps(pc.fill_null(column, zero))))
        key: Numbers | None = None
        for part, size in zip(parts, self._sizes, strict=True):
            key = part if key is None else key * np.int64(size) + part
        return key

    def refusals(self, key: Numbers, item: Numbers) -> dict[str, Mask]:
        """By form, (m,) whether it rules out `item` (m,) in rows with keys (m,)."""
        parts = self._split(key)
        found: dict[str, Mask] = {}
        for attribute, number in zip(self.attributes, parts, strict=False):
            found[f"attribute {attribute.form.item}"] = ~attribute.has(number, item)
        if self.interval is not None:
            found["interval"] = ~self.interval.has(parts[-1], item)
        return found

    def admit(self, key: Numbers | None, item: Numbers) -> Mask:
        """(m,) whether rows with keys (m,) may show `item` (m,); None has no form."""
        found = np.ones(len(item), dtype=bool)
        if key is not None:
            for refused in self.refusals(key, item).values():
                found &= ~refused
        return found

    def bitmap(self, keys: Numbers, device: torch.device) -> torch.Tensor:
        """(G, ceil(N / 64)) int64 of distinct keys.

        Raises:
            DataError: they take more than `batch_bytes`.
        """
        size, most = len(keys) * 8 * -(-self.num_items // WORD), self._limits.batch_bytes
        if size > most:
            raise DataError(
                f"a batch has {len(keys):,} different sets of eligible items, whose bitmaps over "
                f"{self.num_items:,} items take {size / 2**30:.1f} GiB, more than "
                f"{most / 2**30:.1f} GiB: make training.batch_size and evaluation.batch_rows "
                "smaller, or round the times of eligible.interval"
            )
        with self._lock:
            stacked = self._stacked
            if (
                stacked is not None
                and stacked[1].device == device
                and np.array_equal(stacked[0], keys)
            ):
                return stacked[1]
            self._stacked = None
            words = np.empty((len(keys), -(-self.num_items // WORD)), dtype=np.uint64)
            # In the order of time: neighboring segments differ in few bits.
            order = np.arange(len(keys)) if self.interval is None else self._by_time(keys)
            for index in order:
                words[index] = self._of(int(keys[index]))
            found = tensor_of(words.view(np.int64), device)
            if found.nbytes <= self._limits.cache_bytes:
                self._stacked = keys, found
            return found

    def count(self, key: int) -> int:
        """Number of items of a key."""
        with self._lock:
            if key not in self._counts:
                if len(self._counts) >= _KEPT_COUNTS:
                    self._counts.clear()
                bits = self._of(key).view(np.uint8)
                self._counts[key] = int(_BITS_OF_BYTE[bits].sum(dtype=np.int64))
            return self._counts[key]

    def items(self, key: int) -> Numbers:
        """The items of a key."""
        with self._lock:
            bits = self._of(key).view(np.uint8)
        return np.flatnonzero(np.unpackbits(bits, count=self.num_items, bitorder="little"))

    def _split(self, key: Numbers) -> list[Numbers]:
        """The numbers that keys consist of."""
        parts: list[Numbers] = []
        for size in reversed(self._sizes):
            key, part = np.divmod(key, np.int64(size))
            parts.append(part)
        return parts[::-1]

    def _by_time(self, keys: Numbers) -> Numbers:
        order: Numbers = np.argsort(self._split(keys)[-1], kind="stable")
        return order

    def _of(self, key: int) -> Words:
        """(ceil(N / 64),) bitmap of one key."""
        return self._kept((_GROUP, key), lambda: self._made(key))

    def _made(self, key: int) -> Words:
        parts = [int(part[0]) for part in self._split(np.array([key], dtype=np.int64))]
        words: Words | None = None
        for place, (attribute, number) in enumerate(zip(self.attributes, parts, strict=False)):
            bits = self._kept((place, number), partial(attribute.bits, number))
            words = bits if words is None else words & bits
        if self.interval is not None:
            bits = self.interval.bits(parts[-1])
            words = bits if words is None else words & bits
        assert words is not None, "a key has an attribute or an interval"
        return words

    def _kept(self, key: tuple[int, int], make: Callable[[], Words]) -> Words:
        """A bitmap from the cache, or made and kept; those used last stay."""
        words = self._words.get(key)
        if words is not None:
            self._words.move_to_end(key)
            return words
        words = self._words[key] = make()
        while len(self._words) > 1 and words.nbytes * len(self._words) > self._limits.cache_bytes:
            self._words.popitem(last=False)
        return words


def _item_column(catalogue: Catalogue, name: str) -> pa.ChunkedArray:
    if name not in catalogue.schema.columns:
        raise DataError(
            f"the section 'eligible' of the log schema reads the catalogue's column '{name}', "
            "which the catalogue was opened without; it has "
            f"{', '.join(catalogue.schema.columns)}. Ingest both together, or name it in the "
            "catalogue schema's 'eligible'"
        )
    return catalogue.column(name)
