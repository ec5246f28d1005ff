"""Encoding of raw feature columns as arrays for the towers."""

from __future__ import annotations

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

from offtower.checksums import read_checked_json, write_checked_json
from offtower.data.columns import (
    CategoryType,
    Column,
    as_float_array,
    as_float_matrix,
    category_type,
    category_values,
    distinct_values,
    hash_values,
    is_text,
    list_parts,
)
from offtower.data.feature_columns import feature_column, fitted_categories
from offtower.data.features import (
    BagArray,
    BagTensor,
    FeatureArrays,
    concat,
    nbytes,
    num_rows,
    take,
    tensor_of,
    to_tensors,
)
from offtower.data.lookup import Vocabulary
from offtower.data.schema import FeatureSpec, spec_from_dict, spec_to_dict
from offtower.errors import DataError, RunError
from offtower.paths import safe_relative

__all__ = [
    "BagArray",
    "BagTensor",
    "FeatureArrays",
    "FeatureEncoding",
    "concat",
    "nbytes",
    "num_rows",
    "take",
    "tensor_of",
    "to_tensors",
]

MAX_VOCABULARY = 50_000_000
"""Most distinct texts of a feature with a vocabulary; more need hashing."""
MAX_INTEGERS = 500_000_000
"""The same for integers, of 8 bytes each."""

_FILE = "encoding.json"
_COLUMNS_AT_ONCE = 256
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class _Moments:
    """Count, mean and sum of squared deviations, mergeable (Chan et al. 1979)."""

    count: int
    mean: NDArray[np.float64]
    square: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[Any]) -> _Moments:
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
        """Return standard deviations; 1 for constant columns."""
        deviation = np.sqrt(self.square / max(self.count, 1))
        return np.where(deviation > 1e-12 * np.maximum(np.abs(self.mean), 1.0), deviation, 1.0)


class FeatureEncoding:
    """Fitted encodings of the features of contexts or of items.

    Numeric and vector features are standardized with the mean and deviation of the training rows.
    Categories and bags become indices into embedding tables; index 0 is null and unseen values.

    Args:
        specs: the features; every vector has its `dim`.
        mean, scale: of numeric and vector features, by name.
        vocabulary: of categories and bags with a vocabulary, by name: distinct values, sorted.
        types: of the categories and bags that it was fitted on, by name, to which values of other
            types are cast; none are cast by default.
    """

    def __init__(
        self,
        specs: tuple[FeatureSpec, ...],
        mean: Mapping[str, NDArray[np.float64]],
        scale: Mapping[str, NDArray[np.float64]],
        vocabulary: Mapping[str, pa.Array],
        types: Mapping[str, CategoryType] | None = None,
    ) -> None:
        self.specs = specs
        self._mean = dict(mean)
        self._scale = dict(scale)
        self._vocabulary = dict(vocabulary)
        self._types = dict(types or {})
        self._numbers = {name: Vocabulary(values) for name, values in vocabulary.items()}

    @property
    def types(self) -> Mapping[str, CategoryType]:
        """Types of the categories and bags that it was fitted on, by name."""
        return self._types

    @classmethod
    def fit(cls, specs: Iterable[FeatureSpec], tables: Iterable[pa.Table]) -> FeatureEncoding:
        """Fit in one pass over the tables.

        The same tables give the same bits. Other cuts of the same rows give the same vocabularies,
        and means and deviations that differ by rounding.

        Raises:
            DataError: vectors of several lengths, or too many distinct values for a vocabulary.
        """
        specs = tuple(specs)
        moments: dict[str, _Moments] = {}
        counts: dict[str, _Counter] = {}
        types: dict[str, CategoryType] = {}
        for table in tables:
            for spec in specs:
                column = feature_column(spec, table.column(spec.source))
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
                    continue
                _note_type(types, spec, column)
                if spec.encoding == "vocabulary":
                    counts.setdefault(spec.name, _Counter(spec)).add(column)
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
            types,
        )

    def encode(self, table: pa.Table) -> FeatureArrays:
        """Encode the columns of checked rows, or of contexts.

        Raises:
            DataError: a column is of a type, or holds a value, that is none of the feature's kind.
        """
        return {spec.name: self._encode_one(spec, table) for spec in self.specs}

    def only(self, name: str) -> FeatureEncoding:
        """The encoding of one of the features."""
        return FeatureEncoding(
            tuple(spec for spec in self.specs if spec.name == name),
            {key: value for key, value in self._mean.items() if key == name},
            {key: value for key, value in self._scale.items() if key == name},
            {key: value for key, value in self._vocabulary.items() if key == name},
        )

    def cardinality(self, name: str) -> int:
        """Return the rows of the embedding table of a category or bag, with the unknown one."""
        spec = next(s for s in self.specs if s.name == name)
        if spec.encoding == "hash":
            return 1 + spec.buckets
        return 1 + len(self._vocabulary[name])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON content; `save` is for large vocabularies."""
        values = {name: array.to_pylist() for name, array in self._vocabulary.items()}
        return {**self.numbers(), "vocabulary": values}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FeatureEncoding:
        """Restore what `to_dict` returned."""
        return cls._from_parts(
            content,
            {
                name: pa.array(v or pa.array([], pa.string()))
                for name, v in content["vocabulary"].items()
            },
        )

    def save(self, directory: Path) -> None:
        """Write a Parquet file per vocabulary, and last the rest as JSON."""
        directory.mkdir(parents=True, exist_ok=True)
        files = {name: f"vocabulary_{i}.parquet" for i, name in enumerate(self._vocabulary)}
        for name, file in files.items():
            pq.write_table(pa.table({"value": self._vocabulary[name]}), directory / file)
        content = {**self.numbers(), "vocabulary": files}
        write_checked_json(directory / _FILE, content)

    @classmethod
    def load(cls, directory: Path) -> FeatureEncoding:
        """Read what `save` wrote.

        Raises:
            RunError: a file is missing or damaged.
        """
        try:
            content = read_checked_json(directory / _FILE)
            values = {
                name: _read_vocabulary(directory / safe_relative(file, directory / _FILE, RunError))
                for name, file in content["vocabulary"].items()
            }
            return cls._from_parts(content, values)
        except RunError:
            raise
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise RunError(f"the encoding at '{directory}' cannot be read: {error}") from error

    def share(self, values: pa.Array) -> None:
        """Replace vocabularies equal to `values` (such as the catalogue's ids), to save memory."""
        for name, vocabulary in self._vocabulary.items():
            if vocabulary.equals(values):
                self._vocabulary[name] = values
                self._numbers[name] = Vocabulary(values)

    def numbers(self) -> dict[str, Any]:
        """Return specs, means, scales and types as JSON content, without the vocabularies."""
        return {
            "specs": [spec_to_dict(spec) for spec in self.specs],
            "mean": {name: value.tolist() for name, value in self._mean.items()},
            "scale": {name: value.tolist() for name, value in self._scale.items()},
            "types": self._types,
        }

    @classmethod
    def _from_parts(
        cls, content: Mapping[str, Any], vocabulary: Mapping[str, pa.Array]
    ) -> FeatureEncoding:
        return cls(
            tuple(spec_from_dict(spec) for spec in content["specs"]),
            {name: np.asarray(value) for name, value in content["mean"].items()},
            {name: np.asarray(value) for name, value in content["scale"].items()},
            vocabulary,
            content["types"],
        )

    def _encode_one(self, spec: FeatureSpec, table: pa.Table) -> np.ndarray | BagArray:
        column = feature_column(spec, table.column(spec.source))
        if spec.kind == "numeric":
            values = as_float_array(column)
            return self._standardize(spec.name, values.reshape(-1, 1)).reshape(-1)
        if spec.kind == "vector":
            return self._standardize(spec.name, as_float_matrix(column, spec.dim, spec.name))
        if spec.kind == "category":
            return self._index(spec, column)
        values, offsets = list_parts(column)
        return BagArray(self._index(spec, values), offsets)

    def _standardize(self, name: str, values: NDArray[Any]) -> NDArray[np.float32]:
        # float64 keeps small differences of large numbers (timestamps).
        standard = np.empty(values.shape, dtype=np.float32)
        for start in range(0, len(values), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            standard[some] = (values[some] - self._mean[name]) / self._scale[name]
        return standard

    def _index(self, spec: FeatureSpec, values: Column) -> NDArray[np.int64]:
        """Return 1 + the index in the vocabulary or hash bucket; 0 for null and unseen values."""
        fitted = self._types.get(spec.name)
        distinct, index = distinct_values(
            values if fitted is None else fitted_categories(spec, values, fitted)
        )
        if spec.encoding == "hash":
            seed = np.uint64(zlib.crc32(spec.name.encode()))
            bucket = (hash_values(distinct) ^ seed) % np.uint64(spec.buckets)
            of_distinct = 1 + bucket.astype(np.int64)
        else:
            vocabulary = self._numbers[spec.name]
            # Without a value in the vocabulary no type was found.
            known = len(vocabulary.values) > 0
            of_distinct = (
                1 + vocabulary.find(pc.cast(distinct, vocabulary.values.type))
                if known
                else np.zeros(len(distinct), dtype=np.int64)
            )
        return np.append(of_distinct, 0)[index]


def _has_vocabulary(spec: FeatureSpec) -> bool:
    return spec.kind in ("category", "bag") and spec.encoding == "vocabulary"


def _note_type(types: dict[str, CategoryType], spec: FeatureSpec, column: Column) -> None:
    kind = column.type.value_type if spec.kind == "bag" else column.type
    found = category_type(kind)
    if found is None or column.null_count == len(column):
        return
    before = types.setdefault(spec.name, found)
    if before != found:
        raise DataError(
            f"feature '{spec.name}' holds {before} in one file and {found} in another; write all "
            "files alike"
        )


class _Counter:
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
        table = pa.table({"value": found.field("values"), "count": found.field("counts")})
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


def _vocabulary(spec: FeatureSpec, counts: Mapping[str, _Counter]) -> pa.Array:
    if spec.name not in counts:
        return pa.array([], pa.string())
    table = counts[spec.name].table()
    kept = table.filter(pc.greater_equal(table.column("count"), spec.min_count)).column("value")
    kept = kept.combine_chunks()
    return kept.take(pc.sort_indices(kept))


def _read_vocabulary(file: Path) -> pa.Array:
    return pq.read_table(file).column("value").combine_chunks()
