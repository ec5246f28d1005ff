"""Encoding of raw feature columns as arrays for the towers."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
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
    distinct_values,
    hash_values,
    list_parts,
)
from offtower.data.encoding_fit import (
    EncodingSums,
    FeatureMoments,
    has_vocabulary,
    vocabulary_of,
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
from offtower.data.histories import AGE, DWELL, EVENT, HistoryBasis, read_events
from offtower.data.lookup import Lookup, Vocabulary
from offtower.data.mapped_lookup import open_vocabulary
from offtower.data.schema import FeatureSpec, spec_from_dict, spec_to_dict
from offtower.data.texts import text_bags
from offtower.errors import RunError
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

_FILE = "encoding.json"
_ROWS_AT_ONCE = 4096
_VALUES_AT_ONCE = 1 << 20


class FeatureEncoding:
    """Fitted encodings of the features of contexts or of items.

    Numeric and vector features are standardized with the mean and deviation of the training rows.
    Categories, bags and the tokens of texts become indices into embedding tables; index 0 is null
    and unseen values.
    So do histories, whose vocabulary is the catalogue's ids.

    Args:
        specs: the features; every vector has its `dim`.
        mean, scale: of numeric and vector features, by name.
        vocabulary: of categories and bags with a vocabulary, by name: distinct values, sorted
            unless it was extended.
        types: of the categories and bags that it was fitted on, by name, to which values of other
            types are cast; none are cast by default.
        timestamp: column of the rows' times, where histories have times.
    """

    def __init__(
        self,
        specs: tuple[FeatureSpec, ...],
        mean: Mapping[str, NDArray[np.float64]],
        scale: Mapping[str, NDArray[np.float64]],
        vocabulary: Mapping[str, pa.Array],
        types: Mapping[str, CategoryType] | None = None,
        timestamp: str | None = None,
    ) -> None:
        self.specs = specs
        self.timestamp = timestamp
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
    def fit(
        cls,
        specs: Iterable[FeatureSpec],
        tables: Iterable[pa.Table],
        histories: HistoryBasis | None = None,
    ) -> FeatureEncoding:
        """Fit in one pass over the tables.

        The same tables give the same bits. Other cuts of the same rows give the same vocabularies,
        and means and deviations that differ by rounding.

        Args:
            histories: needed where a feature is a history.

        Raises:
            DataError: vectors of several lengths, or too many distinct values for a vocabulary.
        """
        timestamp = None if histories is None else histories.timestamp
        return cls.of_sums(EncodingSums.of(specs, tables, timestamp), histories)

    @classmethod
    def of_sums(cls, sums: EncodingSums, histories: HistoryBasis | None = None) -> FeatureEncoding:
        """Fit on what a pass over tables found."""
        vocabulary = {
            part.name: vocabulary_of(part, sums.counts)
            for part in sums.parts
            if has_vocabulary(part)
        }
        types = dict(sums.types)
        for spec in sums.specs:
            if spec.history:
                assert histories is not None, "histories are features of logs with a catalogue"
                vocabulary[spec.name] = histories.vocabulary
                types[spec.name] = histories.type
        return cls(
            sums.specs,
            {name: m.mean for name, m in sums.moments.items()},
            {name: m.scale() for name, m in sums.moments.items()},
            vocabulary,
            types,
            _timestamp(sums.specs, histories),
        )

    def extended(
        self,
        vocabulary: Mapping[str, pa.Array],
        types: Mapping[str, CategoryType],
        moments: Mapping[str, FeatureMoments],
        moving: float,
    ) -> FeatureEncoding:
        """The same features with other vocabularies, and with means and variances moved.

        Args:
            vocabulary, types: by feature, those that change.
            moments: of new rows. moving: their weight; 0 keeps means and deviations.
        """
        mean, scale = dict(self._mean), dict(self._scale)
        for name, found in moments.items() if moving > 0.0 else ():
            mean[name] = (1.0 - moving) * mean[name] + moving * found.mean
            square = (1.0 - moving) * scale[name] ** 2 + moving * found.scale() ** 2
            scale[name] = np.sqrt(square)
        return FeatureEncoding(
            self.specs,
            mean,
            scale,
            {**self._vocabulary, **vocabulary},
            {**self._types, **types},
            self.timestamp,
        )

    def vocabulary(self, name: str) -> pa.Array:
        """The values of a category or bag with a vocabulary, in the order of its table's rows."""
        return self._vocabulary[name]

    def encode(self, table: pa.Table) -> FeatureArrays:
        """Encode the columns of checked rows, or of contexts.

        Raises:
            DataError: a column is of a type, or holds a value, that is none of the feature's kind.
        """
        return {spec.name: self._encode_one(spec, table) for spec in self.specs}

    def only(self, name: str) -> FeatureEncoding:
        """The encoding of one of the features."""
        specs = tuple(spec for spec in self.specs if spec.name == name)
        names = {part.name for spec in specs for part in (spec, *spec.parts)}
        return FeatureEncoding(
            specs,
            {key: value for key, value in self._mean.items() if key in names},
            {key: value for key, value in self._scale.items() if key in names},
            {key: value for key, value in self._vocabulary.items() if key in names},
            timestamp=self.timestamp,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that `encode` reads."""
        timed = () if self.timestamp is None else (self.timestamp,)
        return tuple(
            dict.fromkeys([*(name for spec in self.specs for name in spec.sources), *timed])
        )

    def cardinality(self, name: str) -> int:
        """Return the rows of the embedding table of a category, bag or history (or of a part of
        one), with the unknown one."""
        spec = next((s for s in self.specs if s.name == name), None)
        if spec is not None and spec.encoding == "hash":
            return 1 + spec.buckets
        return 1 + len(self._vocabulary[name])

    def same_values(self, name: str, other: FeatureEncoding, feature: str) -> bool:
        """Whether a feature's indices mean the same values as those of another's feature."""
        own, others = self._vocabulary.get(name), other._vocabulary.get(feature)
        return own is not None and others is not None and bool(own.equals(others))

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
            known = {
                name: open_vocabulary(directory / safe_relative(file, directory / _FILE, RunError))
                for name, file in content["vocabulary"].items()
            }
            found = cls._from_parts(content, {name: one.values for name, one in known.items()})
            found._numbers = known
            return found
        except RunError:
            raise
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise RunError(f"the encoding at '{directory}' cannot be read: {error}") from error

    def share(self, lookup: Lookup) -> None:
        """Use a lookup (such as that of the catalogue's ids) for vocabularies equal to its values,
        to save memory."""
        for name, vocabulary in self._vocabulary.items():
            if vocabulary.equals(lookup.values):
                self._vocabulary[name] = lookup.values
                self._numbers[name] = Vocabulary(lookup.values, lookup)

    @property
    def digest(self) -> str:
        """sha256 of everything that encoded features depend on."""
        found = hashlib.sha256(json.dumps(self.numbers(), sort_keys=True).encode())
        for name, values in self._vocabulary.items():
            found.update(f"{name}:{len(values)}".encode())
            for start in range(0, len(values), _VALUES_AT_ONCE):
                part = pa.record_batch([values.slice(start, _VALUES_AT_ONCE)], names=["value"])
                found.update(part.serialize())
        return found.hexdigest()

    def numbers(self) -> dict[str, Any]:
        """Return specs, means, scales and types as JSON content, without the vocabularies."""
        return {
            "specs": [spec_to_dict(spec) for spec in self.specs],
            "mean": {name: value.tolist() for name, value in self._mean.items()},
            "scale": {name: value.tolist() for name, value in self._scale.items()},
            "types": self._types,
            **({} if self.timestamp is None else {"timestamp": self.timestamp}),
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
            content.get("timestamp"),
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
        if spec.kind == "text":
            return text_bags(spec, column)
        if spec.history:
            return self._history(spec, column, table)
        values, offsets = list_parts(column)
        return BagArray(self._index(spec, values), offsets)

    def _history(self, spec: FeatureSpec, column: Column, table: pa.Table) -> BagArray:
        events = read_events(spec, column, table, self.timestamp).newest(spec.most_events)
        columns: dict[str, np.ndarray] = {}
        if events.times is not None:
            columns[AGE] = events.age()
        for part in spec.parts:
            if part.kind == "category":
                columns[EVENT] = self._index(part, events.types)
            else:
                assert events.dwell is not None, "a part of this kind has the column"
                dwell = self._standardize(part.name, events.dwell.reshape(-1, 1))
                columns[DWELL] = dwell.reshape(-1)
        return BagArray(self._index(spec, events.items), events.offsets, columns)

    def _standardize(self, name: str, values: NDArray[Any]) -> NDArray[np.float32]:
        # float64 keeps small differences of large numbers (timestamps).
        standard = np.empty(values.shape, dtype=np.float32)
        for start in range(0, len(values), _ROWS_AT_ONCE):
            some = slice(start, start + _ROWS_AT_ONCE)
            standard[some] = (values[some] - self._mean[name]) / self._scale[name]
        return standard

    def restored(self, name: str, standardized: np.ndarray) -> NDArray[np.float64]:
        """Undo the standardization of a number, to the precision of float32."""
        numbers: NDArray[np.float64] = standardized * self._scale[name] + self._mean[name]
        return numbers

    def standardized(self, name: str, number: float) -> np.float32:
        """The value that rows with this number have; larger numbers never have smaller ones."""
        one: np.float32 = self._standardize(name, np.full((1, 1), number))[0, 0]
        return one

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


def _timestamp(specs: tuple[FeatureSpec, ...], histories: HistoryBasis | None) -> str | None:
    """The column of the rows' times, where histories have times."""
    timed = any(spec.times is not None for spec in specs)
    return histories.timestamp if histories is not None and timed else None
