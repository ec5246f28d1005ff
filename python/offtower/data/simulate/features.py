"""Features of a simulated world, drawn for contexts and items.

With `kinds="vector"` a context is one vector and an item is one vector. With `kinds="all"` the
state that determines rewards depends on every kind of feature, so that a tower needs them all:

    state = vector + center[category] + mean of tag vectors (0 for an empty bag) + number direction

scaled to unit variance per coordinate. The state is linear in the encoded features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from offtower.data.schema import FeatureSpec
from offtower.errors import DataError

FeatureKinds = Literal["vector", "all"]

_MOST_TAGS = 4


@dataclass(frozen=True)
class SideNames:
    """Column names of one side of the world."""

    vector: str
    number: str
    category: str
    bag: str


CONTEXT_NAMES = SideNames("context", "activity", "segment", "interests")
ITEM_NAMES = SideNames("action_context", "price", "genre", "tags")


class Side:
    """Draws the features of contexts (or items) and computes their state.

    Args:
        names: column names.
        dim: dimension d of the vector and of the state.
        kinds: which features exist.
        rng: source of the fixed parameters (centers, tag vectors, direction).
        categories: number of categories.
        tags: number of different tags.
    """

    def __init__(
        self,
        names: SideNames,
        dim: int,
        kinds: FeatureKinds,
        rng: np.random.Generator,
        categories: int = 12,
        tags: int = 30,
    ) -> None:
        self.names = names
        self.dim = dim
        self.kinds = kinds
        self._centers = rng.standard_normal((categories, dim))
        self._tag_vectors = rng.standard_normal((tags, dim))
        self._direction = rng.standard_normal(dim)
        self._category_names = pa.array([f"{names.category}-{i:02d}" for i in range(categories)])
        self._tag_names = pa.array([f"{names.bag}-{i:02d}" for i in range(tags)])

    @property
    def specs(self) -> tuple[FeatureSpec, ...]:
        """The features, as a schema lists them."""
        vector = FeatureSpec(name=self.names.vector, kind="vector", dim=self.dim)
        if self.kinds == "vector":
            return (vector,)
        return (
            vector,
            FeatureSpec(name=self.names.number, kind="numeric"),
            FeatureSpec(name=self.names.category, kind="category"),
            FeatureSpec(name=self.names.bag, kind="bag"),
        )

    def columns(
        self,
        vector: NDArray[np.float32],
        rng: np.random.Generator,
        category: NDArray[np.int64] | None = None,
    ) -> dict[str, pa.Array]:
        """Make the columns of n rows with these vectors; the other features are drawn.

        Args:
            vector: (n, dim) float32.
            rng: source of the draws.
            category: (n,) category of each row; drawn by default.
        """
        n = len(vector)
        columns = {self.names.vector: vector_array(vector)}
        if self.kinds == "vector":
            return columns
        if category is None:
            category = rng.integers(len(self._centers), size=n)
        lengths = rng.integers(0, _MOST_TAGS + 1, size=n)
        tags = rng.integers(len(self._tag_vectors), size=int(lengths.sum()))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns[self.names.number] = pa.array(rng.standard_normal(n).astype(np.float32))
        columns[self.names.category] = self._category_names.take(pa.array(category))
        columns[self.names.bag] = pa.ListArray.from_arrays(
            pa.array(offsets), self._tag_names.take(pa.array(tags))
        )
        return columns

    def state(self, table: pa.Table) -> NDArray[np.float64]:
        """Compute the (n, dim) state of the feature columns of `table`.

        Raises:
            DataError: a category or tag is not one of this world's.
        """
        vector = vector_matrix(_combined(table, self.names.vector), self.dim)
        state: NDArray[np.float64] = vector.astype(np.float64)
        if self.kinds == "vector":
            return state
        number = _combined(table, self.names.number).to_numpy(zero_copy_only=False)
        state += number.astype(np.float64)[:, None] * self._direction
        state += self._centers[self._index(table, self.names.category, self._category_names)]
        bags = _combined(table, self.names.bag)
        lengths = pc.list_value_length(bags).to_numpy(zero_copy_only=False).astype(np.int64)
        tags = self._lookup(pc.list_flatten(bags), self._tag_names, self.names.bag)
        row = np.repeat(np.arange(len(lengths)), lengths)
        for coordinate in range(self.dim):
            total = np.bincount(row, self._tag_vectors[tags, coordinate], minlength=len(lengths))
            state[:, coordinate] += total / np.maximum(lengths, 1)
        state /= np.sqrt(self._variance)
        return state

    @property
    def _variance(self) -> float:
        """Variance of a coordinate of the state, over random parameters."""
        of_bags = sum(1.0 / length for length in range(1, _MOST_TAGS + 1)) / (_MOST_TAGS + 1)
        return 3.0 + of_bags

    def _index(self, table: pa.Table, column: str, names: pa.Array) -> NDArray[np.int64]:
        return self._lookup(_combined(table, column), names, column)

    @staticmethod
    def _lookup(values: pa.Array, names: pa.Array, column: str) -> NDArray[np.int64]:
        index = pc.index_in(values.cast(pa.string()), value_set=names)
        if index.null_count:
            unknown = values.filter(pc.is_null(index))[0].as_py()
            raise DataError(f"column '{column}' holds {unknown!r}, which this world never draws")
        numbers: NDArray[np.int64] = index.to_numpy().astype(np.int64)
        return numbers


def vector_array(values: NDArray[np.floating]) -> pa.FixedSizeListArray:
    """(n, dim) matrix -> Arrow column of fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def vector_matrix(column: pa.Array, dim: int) -> NDArray[np.floating]:
    """Arrow column of lists of `dim` numbers -> (n, dim) matrix."""
    flat = pc.list_flatten(column)
    if len(flat) != len(column) * dim:
        raise DataError(f"the vectors of this world have {dim} numbers, those of the column do not")
    values: NDArray[np.floating] = flat.to_numpy(zero_copy_only=False)
    return values.reshape(len(column), dim)


def _combined(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        raise DataError(f"the table has no column '{name}'; it has {', '.join(table.column_names)}")
    column = table.column(name).combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
