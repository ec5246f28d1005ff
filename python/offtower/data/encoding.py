"""The one place where raw columns become numbers that towers take."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from offtower.data.columns import (
    as_float_array,
    as_float_matrix,
    category_values,
    hash_values,
    list_parts,
)
from offtower.data.features import (
    BagArray,
    BagTensor,
    FeatureArrays,
    concat,
    nbytes,
    num_rows,
    take,
    to_tensors,
)
from offtower.data.schema import FeatureSpec, spec_from_dict, spec_to_dict
from offtower.errors import DataError, RunError

__all__ = [
    "BagArray",
    "BagTensor",
    "FeatureArrays",
    "FeatureEncoding",
    "concat",
    "nbytes",
    "num_rows",
    "take",
    "to_tensors",
]

MAX_VOCABULARY = 50_000_000
"""Distinct values of one feature; beyond, hashing is the way."""

_FILE = "encoding.json"


@dataclass(frozen=True)
class _Moments:
    """Count, mean and sum of squared deviations, which merge exactly (Chan et al. 1979)."""

    count: int
    mean: NDArray[np.float64]
    square: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> _Moments:
        wide = values.astype(np.float64).reshape(len(values), -1)
        mean = wide.mean(axis=0) if len(wide) else np.zeros(wide.shape[1])
        return cls(len(wide), mean, np.square(wide - mean).sum(axis=0))

    def merge(self, other: _Moments) -> _Moments:
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        return _Moments(
            count,
            self.mean + shift * (other.count / count),
            self.square + other.square + shift**2 * (self.count * other.count / count),
        )

    def scale(self) -> NDArray[np.float64]:
        """Standard deviations; 1 where a column never varies."""
        deviation = np.sqrt(self.square / max(self.count, 1))
        return np.where(deviation > 1e-12 * np.maximum(np.abs(self.mean), 1.0), deviation, 1.0)


class FeatureEncoding:
    """Fitted encodings of one side's features.

    numeric and vector features are standardised with the mean and deviation of the training rows;
    categories and bags become indices into embedding tables, with 0 for values that are null or
    were never seen.

    Args:
        specs: the features; every vector has its `dim`.
        mean, scale: of numeric and vector features, by name.
        vocabulary: of categories and bags with a vocabulary, by name: distinct values, sorted.
    """

    def __init__(
        self,
        specs: tuple[FeatureSpec, ...],
        mean: Mapping[str, NDArray[np.float64]],
        scale: Mapping[str, NDArray[np.float64]],
        vocabulary: Mapping[str, pa.Array],
    ) -> None:
        self.specs = specs
        self._mean = dict(mean)
        self._scale = dict(scale)
        self._vocabulary = dict(vocabulary)

    @classmethod
    def fit(
        cls, specs: Iterable[FeatureSpec], tables: Iterable[pa.Table]
    ) -> FeatureEncoding:
        """One pass over the tables; the result does not depend on how the rows are cut.

        Raises:
            DataError: vectors of several lengths, or too many distinct values for a vocabulary.
        """
        specs = tuple(specs)
        moments: dict[str, _Moments] = {}
        counts: dict[str, pa.Table] = {}
        for table in tables:
            for spec in specs:
                column = table.column(spec.source)
                if spec.kind in ("numeric", "vector"):
                    values = (
                        as_float_array(column)
                        if spec.kind == "numeric"
                        else as_float_matrix(column, spec.dim, spec.name)
                    )
                    found = _Moments.of(values)
                    before = moments.get(spec.name)
                    if before is not None and before.mean.shape != found.mean.shape:
                        raise DataError(
                            f"feature '{spec.name}' has vectors of {before.mean.size} and of "
                            f"{found.mean.size} numbers"
                        )
                    moments[spec.name] = found if before is None else before.merge(found)
                elif spec.encoding == "vocabulary":
                    counts[spec.name] = _count(spec, column, counts.get(spec.name))
        fitted = tuple(
            replace(spec, dim=int(moments[spec.name].mean.size))
            if spec.kind == "vector" and spec.name in moments
            else spec
            for spec in specs
        )
        if any(spec.kind == "vector" and spec.dim is None for spec in fitted):
            raise DataError("no rows to fit the encoding of vector features on")
        return cls(
            fitted,
            {name: m.mean for name, m in moments.items()},
            {name: m.scale() for name, m in moments.items()},
            {spec.name: _vocabulary(spec, counts) for spec in specs if _has_vocabulary(spec)},
        )

    def encode(self, table: pa.Table) -> FeatureArrays:
        """Columns of `table` -> arrays. Numbers must be finite: the row check has seen to that."""
        return {spec.name: self._encode_one(spec, table) for spec in self.specs}

    def cardinality(self, name: str) -> int:
        """Rows of the embedding table of a category or bag, the unknown one included."""
        spec = next(s for s in self.specs if s.name == name)
        if spec.encoding == "hash":
            return 1 + spec.buckets
        return 1 + len(self._vocabulary[name])

    def save(self, directory: Path) -> None:
        """JSON for numbers, one Parquet file a vocabulary."""
        directory.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "specs": [spec_to_dict(spec) for spec in self.specs],
            "mean": {name: value.tolist() for name, value in self._mean.items()},
            "scale": {name: value.tolist() for name, value in self._scale.items()},
            "vocabulary": {},
        }
        for number, (name, values) in enumerate(self._vocabulary.items()):
            file = f"vocabulary_{number}.parquet"
            pq.write_table(pa.table({"value": values}), directory / file)
            content["vocabulary"][name] = file
        (directory / _FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> FeatureEncoding:
        """What `save` wrote.

        Raises:
            RunError: a file is missing or damaged.
        """
        try:
            content = json.loads((directory / _FILE).read_text(encoding="utf-8"))
            return cls(
                tuple(spec_from_dict(spec) for spec in content["specs"]),
                {name: np.asarray(value) for name, value in content["mean"].items()},
                {name: np.asarray(value) for name, value in content["scale"].items()},
                {
                    name: pq.read_table(directory / file).column("value").combine_chunks()
                    for name, file in content["vocabulary"].items()
                },
            )
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
            raise RunError(f"the encoding at '{directory}' cannot be read: {error}") from error

    def _encode_one(self, spec: FeatureSpec, table: pa.Table) -> np.ndarray | BagArray:
        column = table.column(spec.source)
        if spec.kind == "numeric":
            values = as_float_array(column)
            return self._standardise(spec.name, values.reshape(-1, 1)).reshape(-1)
        if spec.kind == "vector":
            return self._standardise(spec.name, as_float_matrix(column, spec.dim, spec.name))
        if spec.kind == "category":
            return self._index(spec, category_values(column))
        values, offsets = list_parts(column)
        return BagArray(self._index(spec, category_values(values)), offsets)

    def _standardise(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        # In float64, so that large offsets (timestamps) keep their small differences.
        standard = (values - self._mean[name]) / self._scale[name]
        return standard.astype(np.float32)

    def _index(self, spec: FeatureSpec, values: pa.Array) -> NDArray[np.int64]:
        """Values -> 1 + position in the vocabulary or hash bucket; null and unseen -> 0."""
        encoded = pc.dictionary_encode(values)
        distinct = encoded.dictionary
        if spec.encoding == "hash":
            seed = np.uint64(zlib.crc32(spec.name.encode()))
            bucket = (hash_values(distinct) ^ seed) % np.uint64(spec.buckets)
            of_distinct = 1 + bucket.astype(np.int64)
        else:
            vocabulary = self._vocabulary[spec.name]
            known = pc.index_in(_like(distinct, vocabulary.type), value_set=vocabulary)
            of_distinct = 1 + pc.fill_null(known, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        place = pc.fill_null(encoded.indices, len(distinct)).to_numpy(zero_copy_only=False)
        return np.append(of_distinct, 0)[place]


def _has_vocabulary(spec: FeatureSpec) -> bool:
    return spec.kind in ("category", "bag") and spec.encoding == "vocabulary"


def _count(spec: FeatureSpec, column: pa.ChunkedArray, before: pa.Table | None) -> pa.Table:
    values = category_values(column if spec.kind == "category" else list_parts(column)[0])
    found = pc.value_counts(pc.drop_null(values))
    table = pa.table({"value": found.field("values"), "count": found.field("counts")})
    if before is not None:
        if before.schema.field("value").type != table.schema.field("value").type:
            raise DataError(f"feature '{spec.name}' holds text in one file and numbers in another")
        joined = pa.concat_tables([before, table])
        table = joined.group_by("value").aggregate([("count", "sum")])
        table = table.rename_columns({"count_sum": "count"})
    if table.num_rows > MAX_VOCABULARY:
        raise DataError(
            f"feature '{spec.name}' has more than {MAX_VOCABULARY:,} distinct values; "
            "set its encoding to 'hash', with buckets of your choice"
        )
    return table


def _vocabulary(spec: FeatureSpec, counts: Mapping[str, pa.Table]) -> pa.Array:
    if spec.name not in counts:
        return pa.array([], pa.string())
    table = counts[spec.name]
    kept = table.filter(pc.greater_equal(table.column("count"), spec.min_count)).column("value")
    kept = kept.combine_chunks()
    return kept.take(pc.sort_indices(kept))


def _like(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Values in the vocabulary's type; what cannot be it (text against numbers) becomes null."""
    if values.type == kind:
        return values
    if pa.types.is_string(kind):
        return pc.cast(values, kind)
    return pa.nulls(len(values), kind)
