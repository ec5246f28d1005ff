"""Distributions of a log's context features in bounded memory, by which two logs are compared.

A profile is made of a uniform sample: one random row of each of the `SIZE` independent units (user,
else round, else row) whose hashes are smallest (bottom-k: Cohen and Kaplan 2007). It depends on the
set of rows alone, not on how they are cut into tables.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import (
    as_array,
    as_float_array,
    as_float_matrix,
    category_values,
    hash_values,
    hashed,
    list_parts,
    splitmix64,
)
from offtower.data.feature_columns import feature_column
from offtower.data.row_sketch import packed, unpacked
from offtower.data.schema import FeatureSpec, LogSchema

SIZE = 16_384
"""Units of a sample."""
POINTS = 1024
"""Quantiles that are kept of a number's sample."""
BUCKETS = 32
"""Classes into which the values of a category fall by their hash; null is one more."""
_COMMON = 32
"""Values of a category whose shares are kept by name."""
_KEY, _TIE = "\0key", "\0tie"


@dataclass(frozen=True, eq=False)
class UnitSample:
    """Rows of the units of smallest hash, sorted by it; features as columns of single values."""

    specs: tuple[FeatureSpec, ...]
    table: pa.Table | None = None

    def with_rows(self, table: pa.Table, schema: LogSchema, row: NDArray[np.int64]) -> UnitSample:
        """The sample with further rows; without them where rows have weights, since those of a
        down-sampled log are not distributed as its source.

        Args:
            schema: names the columns of users and rounds.
            row: (n,) numbers of the rows in the log.
        """
        if schema.weight is not None:
            return self
        number = row.astype(np.uint64)
        unit = schema.user_id or schema.round_id
        key = splitmix64(number if unit is None else hashed(table.column(unit)))
        tie = splitmix64(splitmix64(number))
        before = self.table
        if before is not None and before.num_rows == SIZE:
            largest = before.column(_KEY)[-1].as_py()
            kept = np.flatnonzero(key <= np.uint64(largest))
            table, key, tie = table.take(pa.array(kept)), key[kept], tie[kept]
        chosen = _smallest(key, tie)
        table, key, tie = table.take(pa.array(chosen)), key[chosen], tie[chosen]
        columns = {_KEY: pa.array(key), _TIE: pa.array(tie)}
        for spec in self.specs:
            columns |= _single_values(spec, table, tie)
        found = pa.table(columns)
        if before is None:
            return UnitSample(self.specs, found)
        return self.merge(UnitSample(self.specs, found))

    def merge(self, other: UnitSample) -> UnitSample:
        """The sample of both logs' rows."""
        if self.table is None or other.table is None:
            return other if self.table is None else self
        both = pa.concat_tables([self.table, other.table]).combine_chunks()
        order = _smallest(both.column(_KEY).to_numpy(), both.column(_TIE).to_numpy())
        return UnitSample(self.specs, both.take(pa.array(order)))

    def profile(self) -> LogProfile:
        """The distributions of the sample's columns."""
        if self.table is None:
            return LogProfile(0, {})
        columns = {
            name: ColumnProfile.of(self.table.column(name))
            for name in self.table.column_names
            if name not in (_KEY, _TIE)
        }
        return LogProfile(self.table.num_rows, columns)


@dataclass(frozen=True, eq=False)
class ColumnProfile:
    """The distribution of a column: of numbers its quantiles, of categories its classes.

    Attributes:
        quantiles: (q,) at equal steps, all values where there are at most `POINTS`; None for a
            category.
        buckets: (1 + BUCKETS,) units by class of their value, null first; None for a number.
        common: shares of the most frequent values of a category.
    """

    quantiles: NDArray[np.float32] | None
    buckets: NDArray[np.int64] | None
    common: Mapping[str, float]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> ColumnProfile:
        array, n = as_array(column), len(column)
        if pa.types.is_floating(array.type):
            values = np.sort(as_float_array(array).astype(np.float32))
            if n > POINTS:
                values = values[((np.arange(POINTS) + 0.5) * (n / POINTS)).astype(np.int64)]
            return cls(values, None, {})
        found = pc.value_counts(pc.drop_null(array))
        value, count = found.field("values"), found.field("counts").to_numpy()
        bucket = (hash_values(value) % np.uint64(BUCKETS)).astype(np.int64)
        buckets = np.bincount(1 + bucket, count, minlength=1 + BUCKETS).astype(np.int64)
        buckets[0] = array.null_count
        names = value.to_pylist()
        order = sorted(range(len(names)), key=lambda i: (-count[i], names[i]))[:_COMMON]
        return cls(None, buckets, {names[i]: float(count[i] / n) for i in order})

    def to_dict(self) -> dict[str, Any]:
        return {
            "quantiles": None if self.quantiles is None else packed(self.quantiles, "<f4"),
            "buckets": None if self.buckets is None else self.buckets.tolist(),
            "common": dict(self.common),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ColumnProfile:
        quantiles, buckets = content["quantiles"], content["buckets"]
        return cls(
            None if quantiles is None else unpacked(quantiles, "<f4").astype(np.float32),
            None if buckets is None else np.asarray(buckets, dtype=np.int64),
            content["common"],
        )


@dataclass(frozen=True, eq=False)
class LogProfile:
    """Distributions of the context features of `units` sampled units, by name of the column."""

    units: int
    columns: Mapping[str, ColumnProfile]

    @classmethod
    def of(
        cls, specs: Iterable[FeatureSpec], tables: Iterable[pa.Table], schema: LogSchema
    ) -> LogProfile:
        """The profile of a log's rows."""
        sample, rows = UnitSample(tuple(specs)), 0
        for table in tables:
            number = np.arange(rows, rows + table.num_rows)
            sample, rows = sample.with_rows(table, schema, number), rows + table.num_rows
        return sample.profile()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        columns = {name: one.to_dict() for name, one in self.columns.items()}
        return {"units": self.units, "columns": columns}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LogProfile:
        """The profile of `to_dict`."""
        columns = content["columns"].items()
        return cls(content["units"], {name: ColumnProfile.from_dict(one) for name, one in columns})


def _smallest(key: NDArray[np.uint64], tie: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rows of the smallest keys, one for each key: that of the smallest tie."""
    order = np.lexsort((tie, key))
    first = np.ones(order.size, dtype=bool)
    first[1:] = key[order[1:]] != key[order[:-1]]
    return order[first][:SIZE]


def _single_values(
    spec: FeatureSpec, table: pa.Table, tie: NDArray[np.uint64]
) -> dict[str, pa.Array]:
    """A feature as columns of one number or text a row.

    Vectors have their length and a projection onto a fixed direction; bags their number of values
    and a random one of them; histories likewise, with the newest item.
    """
    column, name = feature_column(spec, table.column(spec.source)), spec.name
    if spec.kind == "numeric":
        return {name: pa.array(as_float_array(column), pa.float64())}
    if spec.kind == "vector":
        values = as_float_matrix(column, spec.dim, name).astype(np.float64)
        seed = zlib.crc32(name.encode())
        direction = np.random.default_rng(seed).normal(size=values.shape[1])
        return {
            f"{name} (norm)": pa.array(np.linalg.norm(values, axis=1)),
            f"{name} (projection)": pa.array(values @ direction),
        }
    if spec.kind == "text":
        texts = pc.cast(category_values(column), pa.string())
        length = pc.fill_null(pc.utf8_length(texts), 0)
        return {f"{name} (characters)": pc.cast(length, pa.float64())}
    if spec.kind == "category":
        return {name: pc.cast(category_values(column), pa.string())}
    items, offsets = list_parts(column)
    counts = np.diff(offsets)
    some = np.full(len(counts), -1, dtype=np.int64)
    if spec.history:
        some = counts - 1
    else:
        filled = counts > 0
        some[filled] = (tie[filled] % counts[filled].astype(np.uint64)).astype(np.int64)
    place = pa.array(offsets[:-1] + some, mask=counts == 0)
    return {
        f"{name} (values)": pa.array(counts.astype(np.float64)),
        name: pc.cast(category_values(items), pa.string()).take(place),
    }
