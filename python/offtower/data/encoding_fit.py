"""Sums over tables that encodings are fitted from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.columns import (
    CategoryType,
    Column,
    as_float_array,
    as_float_matrix,
    category_type,
    category_values,
    is_text,
    list_parts,
)
from offtower.data.feature_columns import feature_column
from offtower.data.histories import read_events
from offtower.data.schema import FeatureSpec
from offtower.errors import DataError

MAX_VOCABULARY = 50_000_000
"""Most distinct texts of a feature with a vocabulary; more need hashing."""
MAX_INTEGERS = 500_000_000
"""The same for integers, of 8 bytes each."""

_COLUMNS_AT_ONCE = 256


@dataclass(frozen=True)
class FeatureMoments:
    """Count, mean and sum of squared deviations, mergeable (Chan et al. 1979)."""

    count: int
    mean: NDArray[np.float64]
    square: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[Any]) -> FeatureMoments:
        wide = values.reshape(len(values), -1)
        mean, square = np.zeros(wide.shape[1]), np.zeros(wide.shape[1])
        # Some columns at a time: the temporary arrays of wide vectors would be the largest ones.
        # Even parts, since numpy adds a single column in another order.
        count = max(1, -(-wide.shape[1] // _COLUMNS_AT_ONCE))
        ends = [wide.shape[1] * part // count for part in range(count + 1)]
        for some in map(slice, ends[:-1], ends[1:]):
            block = wide[:, some].astype(np.float64)
            mean[some] = block.mean(axis=0)
            square[some] = np.square(block - mean[some]).sum(axis=0)
        return cls(len(wide), mean, square)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        return FeatureMoments(
            count,
            self.mean + shift * (other.count / count),
            self.square + other.square + shift**2 * (self.count * other.count / count),
        )

    def scale(self) -> NDArray[np.float64]:
        """Return standard deviations; 1 for constant columns."""
        deviation = np.sqrt(self.square / max(self.count, 1))
        return np.where(deviation > 1e-12 * np.maximum(np.abs(self.mean), 1.0), deviation, 1.0)


def has_vocabulary(spec: FeatureSpec) -> bool:
    return spec.kind in ("category", "bag") and spec.encoding == "vocabulary"


def fitted_columns(
    specs: Iterable[FeatureSpec], table: pa.Table, timestamp: str | None
) -> Iterator[tuple[FeatureSpec, Column]]:
    """The columns that encodings are fitted on; those of a history have a row per event. Texts are
    hashed, and fitted on nothing."""
    for spec in specs:
        if spec.kind == "text":
            continue
        column = feature_column(spec, table.column(spec.source))
        if not spec.history:
            yield spec, column
        elif spec.parts:
            events = read_events(spec, column, table, timestamp).newest(spec.most_events)
            for part in spec.parts:
                values = events.types if part.kind == "category" else pa.array(events.dwell)
                yield part, values


def note_type(types: dict[str, CategoryType], spec: FeatureSpec, column: Column) -> None:
    kind = column.type.value_type if spec.kind == "bag" else column.type
    found = category_type(kind)
    if found is None or column.null_count == len(column):
        return
    check_type(types, spec, found)


def check_type(types: dict[str, CategoryType], spec: FeatureSpec, found: CategoryType) -> None:
    """Note the type of a feature's values; raise DataError where it was another one."""
    before = types.setdefault(spec.name, found)
    if before != found:
        raise DataError(
            f"feature '{spec.name}' holds {before} in one file and {found} in another; write all "
            "files alike"
        )


class ValueCounter:
    """Counts occurrences of values. Counts of new tables are merged once they outnumber the merged
    ones, so that the work per row is constant."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._spec = spec
        self._joined: pa.Table | None = None
        self._waiting: list[pa.Table] = []
        self._rows_waiting = 0

    def add(self, column: pa.ChunkedArray) -> None:
        spec = self._spec
        values = category_values(column if spec.kind == "category" else list_parts(column)[0])
        found = pc.value_counts(pc.drop_null(values))
        self.add_counts(pa.table({"value": found.field("values"), "count": found.field("counts")}))

    def add_counts(self, table: pa.Table) -> None:
        """Add counts that `table` of another counter returned."""
        spec = self._spec
        parts = [self._joined, *self._waiting[:1]]
        if any(part is not None and part.schema != table.schema for part in parts):
            raise DataError(f"feature '{spec.name}' holds text in one file and numbers in another")
        self._waiting.append(table)
        self._rows_waiting += table.num_rows
        joined_rows = 0 if self._joined is None else self._joined.num_rows
        if self._rows_waiting > max(1_000_000, joined_rows):
            self.table()

    def table(self) -> pa.Table:
        """Return the columns value and count, each value once.

        Raises:
            DataError: more distinct values than a vocabulary may have.
        """
        parts = ([] if self._joined is None else [self._joined]) + self._waiting
        if len(parts) == 1:
            self._joined = parts[0]
        else:
            summed = pa.concat_tables(parts).group_by("value").aggregate([("count", "sum")])
            self._joined = summed.rename_columns({"count_sum": "count"}).select(["value", "count"])
        self._waiting, self._rows_waiting = [], 0
        most = MAX_VOCABULARY if is_text(self._joined.schema.field("value").type) else MAX_INTEGERS
        if self._joined.num_rows > most:
            raise DataError(
                f"feature '{self._spec.name}' has more than {most:,} distinct values; "
                "set its encoding to 'hash', with buckets of your choice"
            )
        return self._joined


def vocabulary_of(spec: FeatureSpec, counts: Mapping[str, ValueCounter]) -> pa.Array:
    if spec.name not in counts:
        return pa.array([], pa.string())
    table = counts[spec.name].table()
    kept = table.filter(pc.greater_equal(table.column("count"), spec.min_count)).column("value")
    kept = kept.combine_chunks()
    return kept.take(pc.sort_indices(kept))


@dataclass(frozen=True)
class EncodingPart:
    """What a pass over some of the tables finds out about features.

    Attributes:
        moments: of numbers and vectors, by feature, of one table after the other: their sums are
            added in the order of the tables, whoever read them.
        counts: of the values of categories and bags with a vocabulary. types: of categories and
            bags.
    """

    moments: list[dict[str, FeatureMoments]] = field(default_factory=list)
    counts: dict[str, ValueCounter] = field(default_factory=dict)
    types: dict[str, CategoryType] = field(default_factory=dict)

    @classmethod
    def of(
        cls, specs: Iterable[FeatureSpec], tables: Iterable[pa.Table], timestamp: str | None
    ) -> EncodingPart:
        """Read tables.

        Raises:
            DataError: a feature has values of several types.
        """
        part, specs = cls(), tuple(specs)
        for table in tables:
            part.moments.append({})
            for spec, column in fitted_columns(specs, table, timestamp):
                if spec.kind in ("numeric", "vector"):
                    values = (
                        as_float_array(column)
                        if spec.kind == "numeric"
                        else as_float_matrix(column, spec.dim, spec.name)
                    )
                    part.moments[-1][spec.name] = FeatureMoments.of(values)
                    continue
                note_type(part.types, spec, column)
                if spec.encoding == "vocabulary":
                    part.counts.setdefault(spec.name, ValueCounter(spec)).add(column)
        return part


@dataclass(frozen=True)
class EncodingSums:
    """What one pass over tables finds out about features.

    Attributes:
        specs: the features; a vector has its length once a table was added.
        moments: of numbers and vectors, by feature. counts: of the values of categories and bags
            with a vocabulary. types: of categories and bags.
    """

    specs: tuple[FeatureSpec, ...]
    moments: dict[str, FeatureMoments] = field(default_factory=dict)
    counts: dict[str, ValueCounter] = field(default_factory=dict)
    types: dict[str, CategoryType] = field(default_factory=dict)

    @classmethod
    def of(
        cls, specs: Iterable[FeatureSpec], tables: Iterable[pa.Table], timestamp: str | None
    ) -> EncodingSums:
        """Add up all tables.

        Raises:
            DataError: vectors of several lengths, or no rows with vectors.
        """
        specs = tuple(specs)
        return cls.of_parts(specs, [EncodingPart.of(specs, tables, timestamp)])

    @classmethod
    def of_parts(cls, specs: Iterable[FeatureSpec], parts: Iterable[EncodingPart]) -> EncodingSums:
        """Add up parts, which have the tables in their order: the same bits for any parts.

        Raises:
            DataError: as `of`, or a feature has values of several types.
        """
        sums = cls(tuple(specs))
        for part in parts:
            for moments in part.moments:
                sums._add(moments)
            for spec in sums.parts:
                if spec.name in part.types:
                    check_type(sums.types, spec, part.types[spec.name])
                if spec.name in part.counts:
                    counter = sums.counts.setdefault(spec.name, ValueCounter(spec))
                    counter.add_counts(part.counts[spec.name].table())
        fitted = tuple(
            replace(spec, dim=int(sums.moments[spec.name].mean.size))
            if spec.kind == "vector" and spec.name in sums.moments
            else spec
            for spec in sums.specs
        )
        if any(spec.kind == "vector" and spec.dim is None for spec in fitted):
            raise DataError("no rows to fit the encoding of vector features on")
        return replace(sums, specs=fitted)

    @property
    def parts(self) -> Iterator[FeatureSpec]:
        """All features that may have a vocabulary of values: these, and those of histories."""
        for spec in self.specs:
            yield from (spec, *spec.parts)

    def _add(self, moments: Mapping[str, FeatureMoments]) -> None:
        for name, found in moments.items():
            before = self.moments.get(name)
            if before is not None and before.mean.shape != found.mean.shape:
                raise DataError(
                    f"feature '{name}' has vectors of {before.mean.size} and of "
                    f"{found.mean.size} numbers"
                )
            self.moments[name] = found if before is None else before.merge(found)
