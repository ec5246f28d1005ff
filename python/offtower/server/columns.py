"""Contexts of requests as tables whose columns have one type each, in JSON and Arrow alike.

Requests can then be answered together, and the files of a log of decisions agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from offtower.data.columns import is_list
from offtower.data.formats.bad_cells import shown
from offtower.data.formats.conversion import Conversion
from offtower.data.formats.kinds import ColumnKind, feature_kinds, log_kinds
from offtower.data.formats.options import FileFormat
from offtower.data.formats.types import EXPECTED, is_list_view, plain_type, target_type
from offtower.data.schema import FeatureSpec, LogSchema
from offtower.retrieval import Retriever
from offtower.server.errors import RequestError


@dataclass(frozen=True)
class ContextColumns:
    """The columns that contexts of an export have.

    Attributes:
        features: of the policy.
        conversion: their kinds and types.
        required: those that a search needs.
        times: those of histories' events, and the row's beside them, which may be of any form.
        user_id: the column that a decision needs too; None where the log's schema names none.
    """

    features: tuple[FeatureSpec, ...]
    conversion: Conversion
    required: tuple[str, ...]
    times: tuple[str, ...]
    user_id: str | None

    @classmethod
    def of(cls, retriever: Retriever) -> ContextColumns:
        """Columns of the policy's features, those that say which items are eligible, the user, and
        the numbers that the log's schema keeps."""
        schema = LogSchema.from_dict(retriever.manifest["log_schema"])
        encoding = retriever.tower.encoding
        kinds: dict[str, ColumnKind] = feature_kinds(encoding.specs)
        if encoding.timestamp is not None:
            # Histories have times in the form of the row's, whichever that is.
            kinds[encoding.timestamp] = "any"
        required = list(kinds)
        wanted = {schema.user_id, *schema.keep}
        eligible: dict[str, bool] = {}
        if retriever.eligible is not None:
            eligible = retriever.eligible.id_columns()
            exclude = retriever.eligible.section.exclude
            required += [n for n in eligible if exclude is None or n != exclude.column]
            wanted |= set(eligible)
            if retriever.eligible.needs_times and schema.timestamp is not None:
                required.append(schema.timestamp)
                wanted.add(schema.timestamp)
        kinds |= {name: kind for name, kind in log_kinds(schema).items() if name in wanted}
        types = pa.schema([(name, plain_type(kind)) for name, kind in kinds.items()])
        conversion = Conversion(kinds, types, FileFormat())
        fitted = {s.source: encoding.types.get(s.name) for s in encoding.specs}
        whole = [name for name, kind in fitted.items() if kind == "int64"]
        whole += [name for name, text in eligible.items() if not text]
        for name in dict.fromkeys(whole):
            conversion = conversion.with_ids(name, "int64")
        timed = [name for name, kind in kinds.items() if kind == "times"]
        timed += [] if encoding.timestamp is None else [encoding.timestamp]
        needed = tuple(dict.fromkeys(required))
        return cls(tuple(encoding.specs), conversion, needed, tuple(timed), schema.user_id)

    def check_names(self, names: Iterable[str], *, decisions: bool) -> None:
        """Refuse columns that are unknown, and a lack of those that are needed.

        Args:
            decisions: whether the contexts are to be logged.

        Raises:
            RequestError: names the column.
        """
        there = set(names)
        known = self.conversion.schema.names
        for name in sorted(there - set(known)):
            raise RequestError(
                f"contexts have no column '{name}'; this export's are {', '.join(known)}",
                field=f"contexts.{name}",
            )
        needed = self.required
        if decisions and self.user_id is not None:
            needed = (*needed, self.user_id)
        for name in needed:
            if name not in there:
                why = "the log of decisions" if name not in self.required else "the policy"
                raise RequestError(
                    f"the contexts lack '{name}', which {why} needs", field=f"contexts.{name}"
                )

    def table(self, given: pa.RecordBatch) -> pa.Table:
        """Convert contexts to the columns' types; columns that are not there are null.

        Raises:
            RequestError: names the row and column of the first value that cannot be used.
        """
        arrays = []
        for target in self.conversion.schema:
            name, kind = target.name, self.conversion.kinds[target.name]
            if name not in given.schema.names:
                arrays.append(pa.nulls(given.num_rows, pa.null()))
                continue
            column = given.column(name)
            if name in self.times:
                column = _as_text(column)
            if not _readable(column.type) or target_type(kind, column.type, None, True) is None:
                raise RequestError(
                    f"column '{name}' is of type {column.type}, expected {EXPECTED[kind]}",
                    field=f"contexts.{name}",
                )
            arrays.append(column)
        names = self.conversion.schema.names
        batch, bad = self.conversion(pa.RecordBatch.from_arrays(arrays, names))
        for one in bad:
            raise RequestError(
                f"{shown(one.values[0].as_py())} is {one.problem}, expected "
                f"{EXPECTED[self.conversion.kinds[one.column]]}",
                field=f"contexts[{one.rows[0]}].{one.column}",
            )
        for spec in self.features:
            if spec.kind in ("numeric", "vector"):
                _check_numbers(spec, batch.column(spec.source))
        return pa.Table.from_batches([batch])

    def example(self) -> pa.Table:
        """One context of zeros and nulls, with which a new export is tried."""
        columns = {}
        for target in self.conversion.schema:
            number = pa.types.is_floating(target.type)
            columns[target.name] = pa.array([0.0 if number else None], target.type)
        return pa.table(columns)


def _readable(kind: pa.DataType) -> bool:
    """Whether a column's memory is bounded by the size of the body that it came in."""
    if is_list_view(kind) or pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return False
    if is_list(kind):
        inner = kind.value_type
        return not (pa.types.is_null(inner) or pa.types.is_nested(inner)) and _readable(inner)
    return not pa.types.is_nested(kind)


def _as_text(column: pa.Array) -> pa.Array:
    """Times of Arrow, alone or in lists, as text of ISO 8601."""
    kind = column.type
    inner = kind.value_type if is_list(kind) else kind
    if not pa.types.is_timestamp(inner):
        return column
    return pc.cast(column, pa.string() if inner == kind else pa.list_(pa.string()))


def _check_numbers(spec: FeatureSpec, column: pa.Array) -> None:
    """Refuse what is null or not finite, and vectors of another length."""
    values, rows = column, np.arange(len(column))
    bad = pc.is_null(column).to_numpy(zero_copy_only=False)
    if spec.kind == "vector":
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        bad = bad | (lengths != spec.dim)
        values, rows = column.flatten(), np.repeat(rows, lengths)
    numbers = pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False)
    bad[rows[~np.isfinite(numbers)]] = True
    if bad.any():
        row = int(np.argmax(bad))
        wanted = "a finite number" if spec.kind == "numeric" else f"{spec.dim} finite numbers"
        raise RequestError(
            f"{shown(column[row].as_py())} where {wanted} should be",
            field=f"contexts[{row}].{spec.source}",
        )
