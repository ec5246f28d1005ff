"""Columns of features as encodings take them, from tables of any source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from offtower.data.columns import CategoryType, Column, as_array, as_categories, category_type
from offtower.data.formats.bad_cells import shown
from offtower.data.formats.conversion import Conversion
from offtower.data.formats.kinds import FEATURE_KINDS
from offtower.data.formats.options import FileFormat
from offtower.data.formats.types import EXPECTED, plain_type, target_type
from offtower.data.schema import FeatureSpec
from offtower.errors import DataError


def feature_column(spec: FeatureSpec, column: Column) -> Column:
    """A column with numbers, or lists of them, for what is written as text.

    Raises:
        DataError: its type cannot be one of the feature's kind, or a value is none.
    """
    kind, found = FEATURE_KINDS[spec.kind], column.type
    wanted = target_type(kind, found, None, large=False)
    if wanted is None:
        raise DataError(f"feature '{spec.name}' holds {found}, expected {EXPECTED[kind]}")
    if pa.types.is_null(wanted):
        return pa.nulls(len(column), plain_type(kind))
    if wanted == found or kind == "text":
        return column
    convert = Conversion({spec.name: kind}, pa.schema([(spec.name, wanted)]), FileFormat())
    batch = pa.RecordBatch.from_arrays([as_array(column)], [spec.name])
    converted, bad = convert(batch)
    for cells in bad:
        raise DataError(
            f"feature '{spec.name}' is {shown(cells.values[0].as_py())} in row {cells.rows[0]} "
            f"({cells.problem}), expected {cells.expected}"
        )
    return converted.column(0)


def fitted_categories(spec: FeatureSpec, values: Column, fitted: CategoryType) -> Column:
    """Categories of the type that an encoding was fitted on: 5, "5" and 5.0 are one value.

    Raises:
        DataError: a value has no equal of that type, as 007 among integers.
    """
    if category_type(values.type) == fitted and not _is_fractional(values.type):
        return values
    cast, bad = as_categories(values, fitted)
    if bad.any():
        row = int(np.argmax(bad))
        value: Any = values[row].as_py()
        holds = "text" if isinstance(value, str) else "a value of another type"
        wanted = "text" if fitted == "text" else "integers"
        raise DataError(
            f"feature '{spec.name}' holds {holds}, but {wanted} in the rows that its encoding was "
            f"fitted on: {shown(value)} is none; write the column with one type"
        )
    return cast


def _is_fractional(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_decimal(kind))
